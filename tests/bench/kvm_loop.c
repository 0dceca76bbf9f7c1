/* The least that answers a guest's exits: the yardstick of our vCPU loop.
 *
 *   kvm_loop pio|mmio EXITS     prints nanoseconds for EXITS exits of a guest that does nothing but access,
 *                               without those that the processor gave to other programs
 *
 * The guest, its mode and the interrupt controllers are those of the other side of the comparison.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

#define CODE 0x1000
#define MEMORY 0x100000

static long check(long result, const char *what)
{
    if (result < 0) {
        perror(what);
        exit(1);
    }
    return result;
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Nanoseconds that this thread was ready to run and other programs ran instead. */
static uint64_t starved(void)
{
    unsigned long long ran, waited = 0;
    FILE *f = fopen("/proc/self/schedstat", "r");
    if (f == NULL || fscanf(f, "%llu %llu", &ran, &waited) != 2)
        waited = 0;
    if (f != NULL)
        fclose(f);
    return waited;
}

int main(int argc, char **argv)
{
    static const uint8_t out[] = {0xe6, 0x99, 0x43, 0xeb, 0xfb};                           /* out 0x99, al; inc; jmp */
    static const uint8_t store[] = {0xa3, 0x00, 0x00, 0x00, 0xd0, 0x43, 0xeb, 0xf8};       /* mov [MMIO], eax; inc; jmp */
    uint64_t identity = 0xfeffc000, count, n, start, starved_before;
    if (argc != 3)
        return 2;
    count = strtoull(argv[2], NULL, 10);
    int kvm = (int)check(open("/dev/kvm", O_RDWR), "open /dev/kvm");
    int vm = (int)check(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    check(ioctl(vm, KVM_SET_IDENTITY_MAP_ADDR, &identity), "KVM_SET_IDENTITY_MAP_ADDR");
    check(ioctl(vm, KVM_SET_TSS_ADDR, 0xfeffd000ul), "KVM_SET_TSS_ADDR");
    check(ioctl(vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
    uint8_t *memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return 1;
    struct kvm_userspace_memory_region slot = {.memory_size = MEMORY, .userspace_addr = (uint64_t)memory};
    check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");
    int is_pio = strcmp(argv[1], "pio") == 0;
    memcpy(memory + CODE, is_pio ? out : store, is_pio ? sizeof out : sizeof store);
    int vcpu = (int)check(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    long size = check(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    struct kvm_run *run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    struct kvm_sregs sregs;
    struct kvm_regs regs = {.rip = CODE, .rsp = 0x8000, .rflags = 2};
    check(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
    struct kvm_segment flat = {.limit = 0xffffffff, .selector = 0x10, .type = 3, .s = 1, .present = 1, .db = 1, .g = 1};
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = flat;
    flat.selector = 8;
    flat.type = 0xb;
    sregs.cs = flat;
    sregs.cr0 = 0x11;
    check(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
    check(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
    starved_before = starved();
    start = now();
    for (n = 0; n < count; n++) {
        check(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
        switch (run->exit_reason) {
        case KVM_EXIT_IO:
        case KVM_EXIT_MMIO:
            break;
        default:
            fprintf(stderr, "exit %u\n", run->exit_reason);
            return 1;
        }
    }
    printf("%llu\n", (unsigned long long)(now() - start - (starved() - starved_before)));
    return 0;
}
