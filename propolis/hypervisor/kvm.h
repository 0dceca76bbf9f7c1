/* What Cython cannot express of <linux/kvm.h>: anonymous unions, variable-length structs and shared flags.
 *
 * Everything in kvm_run that the kernel and we both write goes through one accessor here.
 */
#ifndef PROPOLIS_KVM_H
#define PROPOLIS_KVM_H

#include <linux/kvm.h>
#include <stdint.h>

static inline void kvm_run_set_immediate_exit(struct kvm_run *run, int on)
{ __atomic_store_n(&run->immediate_exit, (uint8_t)on, __ATOMIC_SEQ_CST); }

static inline int kvm_run_io_is_out(const struct kvm_run *run) { return run->io.direction == KVM_EXIT_IO_OUT; }
static inline uint32_t kvm_run_io_size(const struct kvm_run *run) { return run->io.size; }
static inline uint32_t kvm_run_io_count(const struct kvm_run *run) { return run->io.count; }
static inline uint16_t kvm_run_io_port(const struct kvm_run *run) { return run->io.port; }
static inline uint8_t *kvm_run_io_data(struct kvm_run *run) { return (uint8_t *)run + run->io.data_offset; }

static inline uint64_t kvm_run_mmio_address(const struct kvm_run *run) { return run->mmio.phys_addr; }
static inline uint32_t kvm_run_mmio_size(const struct kvm_run *run) { return run->mmio.len; }
static inline int kvm_run_mmio_is_write(const struct kvm_run *run) { return run->mmio.is_write; }
static inline uint8_t *kvm_run_mmio_data(struct kvm_run *run) { return run->mmio.data; }

static inline uint64_t kvm_run_hardware_reason(const struct kvm_run *run) { return run->hw.hardware_exit_reason; }
static inline uint64_t kvm_run_entry_failure(const struct kvm_run *run)
{ return run->fail_entry.hardware_entry_failure_reason; }
static inline uint32_t kvm_run_suberror(const struct kvm_run *run) { return run->internal.suberror; }
static inline uint64_t kvm_run_internal(const struct kvm_run *run, uint32_t i)
{ return i < run->internal.ndata && i < 16 ? run->internal.data[i] : 0; }
static inline uint32_t kvm_run_system_event(const struct kvm_run *run) { return run->system_event.type; }

/* Routes: sixteen inputs shared by PIC and I/O APIC, eight of the I/O APIC alone, then MSI routes of lent vectors. */
#define PROPOLIS_MAX_ROUTES 256
struct propolis_routes {
    uint32_t nr;
    uint32_t flags;
    struct kvm_irq_routing_entry entries[PROPOLIS_MAX_ROUTES];
    uint8_t unused[PROPOLIS_MAX_ROUTES]; /* MSI routes that nobody has any more; the kernel reads no further than nr */
};

static inline void propolis_route_chip(struct propolis_routes *r, uint32_t gsi, uint32_t chip, uint32_t pin)
{
    struct kvm_irq_routing_entry entry = { .gsi = gsi, .type = KVM_IRQ_ROUTING_IRQCHIP };
    entry.u.irqchip.irqchip = chip;
    entry.u.irqchip.pin = pin;
    r->entries[r->nr++] = entry;
}

static inline void propolis_route_msi(struct propolis_routes *r, uint32_t index, uint32_t gsi, uint64_t address,
                                      uint32_t data)
{
    struct kvm_irq_routing_entry entry = { .gsi = gsi, .type = KVM_IRQ_ROUTING_MSI };
    entry.u.msi.address_lo = (uint32_t)address;
    entry.u.msi.address_hi = (uint32_t)(address >> 32);
    entry.u.msi.data = data;
    r->entries[index] = entry;
}

#endif
