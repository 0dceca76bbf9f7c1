"""The KVM API (Documentation/virt/kvm/api.rst): only the fields used here; the real header decides layout."""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "propolis/hypervisor/kvm.h" nogil:
    unsigned long KVM_GET_API_VERSION, KVM_CREATE_VM, KVM_CHECK_EXTENSION, KVM_GET_VCPU_MMAP_SIZE
    unsigned long KVM_GET_SUPPORTED_CPUID, KVM_GET_SUPPORTED_HV_CPUID, KVM_GET_MSR_INDEX_LIST
    unsigned long KVM_CREATE_VCPU, KVM_SET_USER_MEMORY_REGION, KVM_SET_TSS_ADDR, KVM_SET_IDENTITY_MAP_ADDR
    unsigned long KVM_CREATE_IRQCHIP, KVM_CREATE_PIT2, KVM_IRQ_LINE, KVM_SIGNAL_MSI, KVM_IOEVENTFD, KVM_IRQFD
    unsigned long KVM_SET_GSI_ROUTING, KVM_GET_IRQCHIP, KVM_SET_IRQCHIP, KVM_GET_PIT2, KVM_SET_PIT2
    unsigned long KVM_RUN, KVM_GET_REGS, KVM_SET_REGS, KVM_GET_SREGS, KVM_SET_SREGS, KVM_SET_CPUID2, KVM_GET_FPU
    unsigned long KVM_SET_FPU, KVM_GET_LAPIC, KVM_SET_LAPIC, KVM_GET_MSRS, KVM_SET_MSRS, KVM_GET_MP_STATE
    unsigned long KVM_SET_MP_STATE, KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS, KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS
    unsigned long KVM_GET_XCRS, KVM_SET_XCRS, KVM_GET_XSAVE, KVM_SET_XSAVE, KVM_TRANSLATE, KVM_NMI
    int KVM_API_VERSION
    int KVM_CAP_IRQCHIP, KVM_CAP_PIT2, KVM_CAP_IOEVENTFD, KVM_CAP_IOEVENTFD_ANY_LENGTH, KVM_CAP_IRQFD
    int KVM_CAP_SIGNAL_MSI, KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_USER_MEMORY, KVM_CAP_XCRS, KVM_CAP_XSAVE
    int KVM_CAP_DEBUGREGS, KVM_CAP_VCPU_EVENTS, KVM_CAP_MAX_VCPUS, KVM_CAP_NR_VCPUS, KVM_CAP_READONLY_MEM
    int KVM_CAP_TSC_DEADLINE_TIMER, KVM_CAP_GET_TSC_KHZ, KVM_CAP_HYPERV, KVM_CAP_SYS_HYPERV_CPUID
    unsigned long KVM_GET_TSC_KHZ
    uint32_t KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY
    uint32_t KVM_IOEVENTFD_FLAG_PIO, KVM_IOEVENTFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_DEASSIGN
    uint32_t KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC
    uint32_t KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED
    uint32_t KVM_SYSTEM_EVENT_SHUTDOWN, KVM_SYSTEM_EVENT_RESET
    uint32_t KVM_EXIT_UNKNOWN, KVM_EXIT_IO, KVM_EXIT_MMIO, KVM_EXIT_INTR, KVM_EXIT_SHUTDOWN, KVM_EXIT_FAIL_ENTRY
    uint32_t KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_SYSTEM_EVENT
    uint32_t PROPOLIS_MAX_ROUTES

    struct kvm_run:
        uint32_t exit_reason
    struct kvm_userspace_memory_region:
        uint32_t slot
        uint32_t flags
        uint64_t guest_phys_addr
        uint64_t memory_size
        uint64_t userspace_addr
    struct kvm_pit_config:
        uint32_t flags
    struct kvm_irq_level:
        uint32_t irq
        uint32_t level
    struct kvm_msi:
        uint32_t address_lo
        uint32_t address_hi
        uint32_t data
    struct kvm_ioeventfd:
        uint64_t addr
        uint32_t len
        int32_t fd
        uint32_t flags
    struct kvm_irqfd:
        uint32_t fd
        uint32_t gsi
        uint32_t flags
    struct kvm_irqchip:
        uint32_t chip_id
    struct kvm_pit_state2:
        pass
    struct kvm_regs:
        uint64_t rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags
    struct kvm_segment:
        uint64_t base
        uint32_t limit
        uint16_t selector
        uint8_t type, present, dpl, db, s, l, g, avl, unusable
    struct kvm_dtable:
        uint64_t base
        uint16_t limit
    struct kvm_sregs:
        kvm_segment cs, ds, es, fs, gs, ss, tr, ldt
        kvm_dtable gdt, idt
        uint64_t cr0, cr2, cr3, cr4, cr8, efer, apic_base
        uint64_t interrupt_bitmap[4]
    struct kvm_fpu:
        pass
    struct kvm_lapic_state:
        pass
    struct kvm_mp_state:
        uint32_t mp_state
    struct kvm_vcpu_events:
        pass
    struct kvm_debugregs:
        pass
    struct kvm_xcrs:
        pass
    struct kvm_xsave:
        pass
    struct kvm_translation:
        uint64_t linear_address
        uint64_t physical_address
        uint8_t valid
    struct kvm_cpuid_entry2:
        uint32_t function, index, flags, eax, ebx, ecx, edx
    struct kvm_cpuid2:
        uint32_t nent
        kvm_cpuid_entry2 *entries
    struct kvm_msr_entry:
        uint32_t index
        uint64_t data
    struct kvm_msrs:
        uint32_t nmsrs
        kvm_msr_entry *entries
    struct kvm_msr_list:
        uint32_t nmsrs
        uint32_t *indices

    struct propolis_routes:
        uint32_t nr
        unsigned char *unused

    void kvm_run_set_immediate_exit(kvm_run *run, bint on)
    bint kvm_run_io_is_out(const kvm_run *run)
    uint32_t kvm_run_io_size(const kvm_run *run)
    uint32_t kvm_run_io_count(const kvm_run *run)
    uint16_t kvm_run_io_port(const kvm_run *run)
    uint8_t *kvm_run_io_data(kvm_run *run)
    uint64_t kvm_run_mmio_address(const kvm_run *run)
    uint32_t kvm_run_mmio_size(const kvm_run *run)
    bint kvm_run_mmio_is_write(const kvm_run *run)
    uint8_t *kvm_run_mmio_data(kvm_run *run)
    uint64_t kvm_run_hardware_reason(const kvm_run *run)
    uint64_t kvm_run_entry_failure(const kvm_run *run)
    uint32_t kvm_run_suberror(const kvm_run *run)
    uint64_t kvm_run_internal(const kvm_run *run, uint32_t i)
    uint32_t kvm_run_system_event(const kvm_run *run)
    void propolis_route_chip(propolis_routes *routes, uint32_t gsi, uint32_t chip, uint32_t pin)
    void propolis_route_msi(propolis_routes *routes, uint32_t index, uint32_t gsi, uint64_t address, uint32_t data)
