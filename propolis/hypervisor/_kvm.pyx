"""The KVM back end: a VM and its vCPUs on /dev/kvm (Documentation/virt/kvm/api.rst).

The whole interrupt controller is the kernel's: PICs, I/O APIC, local APICs and PIT.
"""

cimport cython
from libc.errno cimport EAGAIN, EINTR, ENOENT, ENOSPC, errno
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset, strerror
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport close

from propolis._memory cimport ACCESS_WRITE
from propolis._lock cimport Lock
from propolis._vmm cimport EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MMIO, EXIT_PIO, EXIT_RETRY, EXIT_SHUTDOWN, Vcpu, Vm
from propolis.hypervisor cimport kvm
from propolis.hypervisor._ioctl cimport call, refused
from propolis.hypervisor._kvm_state cimport (
    MAX_MSRS,
    MsrList,
    PowerOn,
    load_registers,
    read_registers,
    remember,
    restore,
)

from propolis.errors import GuestMemoryError, HypervisorError

cdef enum:
    MAX_CPUID = 256
    FIRST_MSI_GSI = 24
    # Intel needs three pages of guest-physical space for real mode, and one for its identity map: between the last
    # device and the firmware's segment.
    IDENTITY_MAP = 0xFEFFC000
    TSS = 0xFEFFD000
    # A message to every local APIC (SDM volume 3A, §11.11): ID 0xFF, and delivery mode 4 is an NMI.
    MSI_TO_ALL = 0xFEEFF000
    MSI_NMI = 0x400
    # Exit reasons of ours, above KVM's: KVM_RUN itself failed.
    REASON_ERRNO = 0x10000

ctypedef struct Cpuid:
    uint32_t nent
    uint32_t padding
    kvm.kvm_cpuid_entry2 entries[MAX_CPUID]


@cython.no_gc_clear
cdef class KvmVm(Vm):
    """A virtual machine of the kernel. `kvm_fd` is an open /dev/kvm, borrowed.

    Raises HypervisorError where the kernel lacks something a machine cannot do without, naming it.
    """

    cdef int fd
    cdef int kvm_fd
    cdef int run_size
    cdef bint has_xcrs
    cdef Lock route_lock
    cdef kvm.propolis_routes routes      # under: route_lock
    cdef uint32_t first_msi_route
    cdef kvm.kvm_irqchip chips[3]
    cdef kvm.kvm_pit_state2 pit
    cdef MsrList msr_list

    def __cinit__(self, *args, **kwargs) -> None:
        self.fd = -1
        self.route_lock = Lock()

    def __init__(self, kvm_fd: int) -> None:
        cdef uint64_t identity_map = IDENTITY_MAP
        cdef long version
        self.kvm_fd = kvm_fd
        version = call(kvm_fd, kvm.KVM_GET_API_VERSION, NULL, "ask KVM's API version")
        if version != kvm.KVM_API_VERSION:
            raise HypervisorError(f"KVM's API version is {version}, not {kvm.KVM_API_VERSION}")
        needed = {
            "user memory": kvm.KVM_CAP_USER_MEMORY, "irqchip": kvm.KVM_CAP_IRQCHIP, "PIT": kvm.KVM_CAP_PIT2,
            "ioeventfd": kvm.KVM_CAP_IOEVENTFD, "irqfd": kvm.KVM_CAP_IRQFD, "MSI": kvm.KVM_CAP_SIGNAL_MSI,
            "immediate exit": kvm.KVM_CAP_IMMEDIATE_EXIT, "vCPU events": kvm.KVM_CAP_VCPU_EVENTS,
            "debug registers": kvm.KVM_CAP_DEBUGREGS, "XSAVE": kvm.KVM_CAP_XSAVE,
        }
        missing = [name for name, number in needed.items() if self.capability(number) <= 0]
        if missing:
            raise HypervisorError(f"this kernel's KVM lacks: {', '.join(missing)}")
        self.has_xcrs = self.capability(kvm.KVM_CAP_XCRS) > 0  # no processor without XSAVE has them
        self.run_size = <int>call(kvm_fd, kvm.KVM_GET_VCPU_MMAP_SIZE, NULL, "ask KVM's run size")
        self.fd = <int>call(kvm_fd, kvm.KVM_CREATE_VM, NULL, "create a virtual machine")
        call(self.fd, kvm.KVM_SET_IDENTITY_MAP_ADDR, &identity_map, "place the identity map")
        call(self.fd, kvm.KVM_SET_TSS_ADDR, <void *><uint64_t>TSS, "place the task state segment")
        self.msr_list.nmsrs = MAX_MSRS
        call(kvm_fd, kvm.KVM_GET_MSR_INDEX_LIST, &self.msr_list, "list the MSRs")

    def add_interrupt_controllers(self) -> None:
        """Gives the machine its PICs, I/O APIC, local APICs and PIT; called once, before there is a vCPU.

        After `map_memory`: a new slot waits for whoever may still read the table of buses that was before these came,
        which takes two ticks of the kernel's clock.
        """
        cdef kvm.kvm_pit_config pit
        call(self.fd, kvm.KVM_CREATE_IRQCHIP, NULL, "create the interrupt controllers")
        memset(&pit, 0, sizeof(pit))
        pit.flags = kvm.KVM_PIT_SPEAKER_DUMMY  # port 0x61, which calibration loops read
        call(self.fd, kvm.KVM_CREATE_PIT2, &pit, "create the PIT")
        self._route_chips()
        self._chips(kvm.KVM_GET_IRQCHIP, kvm.KVM_GET_PIT2)

    cdef int _route_chips(self) except -1:
        cdef uint32_t gsi
        for gsi in range(24):
            # ISA's timer reaches the I/O APIC on pin 2, as MADT says; the cascade, input 2, reaches nothing.
            if gsi < 16 and gsi != 2:
                kvm.propolis_route_chip(
                    &self.routes, gsi, kvm.KVM_IRQCHIP_PIC_MASTER if gsi < 8 else kvm.KVM_IRQCHIP_PIC_SLAVE, gsi & 7)
            if gsi != 2:
                kvm.propolis_route_chip(&self.routes, gsi, kvm.KVM_IRQCHIP_IOAPIC, 2 if gsi == 0 else gsi)
        self.first_msi_route = self.routes.nr
        call(self.fd, kvm.KVM_SET_GSI_ROUTING, &self.routes, "route interrupts")
        return 0

    cdef int _chips(self, unsigned long irqchip, unsigned long pit) except -1:
        """Reads or writes the state of the PICs, the I/O APIC and the PIT."""
        cdef uint32_t i
        for i in range(3):
            self.chips[i].chip_id = i
            call(self.fd, irqchip, &self.chips[i], "transfer an interrupt controller's state")
        call(self.fd, pit, &self.pit, "transfer the PIT's state")
        return 0

    def capability(self, number: int) -> int:
        """KVM_CHECK_EXTENSION."""
        return call(self.kvm_fd, kvm.KVM_CHECK_EXTENSION, <void *><uint64_t>number, "ask for a KVM capability")

    def create_vcpu(self, index: int, on_event) -> Vcpu:
        """A held vCPU, whose events reach `on_event` through the mailbox."""
        return KvmVcpu(self, index, on_event)

    def max_vcpus(self) -> int:
        return self.capability(kvm.KVM_CAP_MAX_VCPUS)

    def has_deadline_timer(self) -> bool:
        """Whether the local APIC's timer takes TSC deadlines; the supported CPUID does not say so."""
        return self.capability(kvm.KVM_CAP_TSC_DEADLINE_TIMER) > 0

    def supported_cpuid(self) -> list:
        """What this host and its KVM can give a guest: (function, index, flags, eax, ebx, ecx, edx) each."""
        return self._cpuid(kvm.KVM_GET_SUPPORTED_CPUID)

    def supported_hyperv(self) -> list:
        """The leaves by which KVM can say that it is a Hyper-V, as above; none where it cannot."""
        if self.capability(kvm.KVM_CAP_HYPERV) <= 0 or self.capability(kvm.KVM_CAP_SYS_HYPERV_CPUID) <= 0:
            return []
        return self._cpuid(kvm.KVM_GET_SUPPORTED_HV_CPUID)

    cdef list _cpuid(self, unsigned long request):
        cdef Cpuid cpuid
        memset(&cpuid, 0, sizeof(cpuid))
        cpuid.nent = MAX_CPUID
        call(self.kvm_fd, request, &cpuid, "ask the supported CPUID")
        return [
            (cpuid.entries[i].function, cpuid.entries[i].index, cpuid.entries[i].flags, cpuid.entries[i].eax,
             cpuid.entries[i].ebx, cpuid.entries[i].ecx, cpuid.entries[i].edx)
            for i in range(cpuid.nent)
        ]

    def map_memory(self) -> None:
        """Gives the guest every region of `memory`; called once, when all are added."""
        cdef uint32_t i
        cdef int result
        for i, (gpa, size, _, read_only, _) in enumerate(self.memory.regions_list()):
            if read_only and self.capability(kvm.KVM_CAP_READONLY_MEM) <= 0:
                raise HypervisorError("this kernel's KVM lacks: read-only memory")
            result = self._set_slot(i, True)
            if result < 0:
                raise HypervisorError(f"map {size:#x} bytes of guest memory at {gpa:#x}: {strerror(-result).decode()}")

    cdef int _set_slot(self, uint32_t index, bint shown) noexcept nogil:
        cdef kvm.kvm_userspace_memory_region slot
        memset(&slot, 0, sizeof(slot))
        slot.slot = index
        slot.guest_phys_addr = self.memory.regions[index].gpa
        if shown:
            slot.flags = 0 if self.memory.regions[index].access & ACCESS_WRITE else kvm.KVM_MEM_READONLY
            slot.memory_size = self.memory.regions[index].size
            slot.userspace_addr = <uint64_t>self.memory.regions[index].host
        return -errno if kvm.ioctl(self.fd, kvm.KVM_SET_USER_MEMORY_REGION, &slot) < 0 else 0

    cdef int show_memory(self, uint64_t gpa, bint shown) noexcept nogil:
        cdef uint32_t i
        for i in range(self.memory.count):
            if self.memory.regions[i].gpa == gpa:
                return self._set_slot(i, shown)
        return -ENOENT

    def reset(self) -> None:
        """Interrupt controllers and PIT to their state at power-on; the vCPUs are held."""
        self._chips(kvm.KVM_SET_IRQCHIP, kvm.KVM_SET_PIT2)

    def inject_nmi(self) -> None:
        """An NMI for every vCPU, whatever it does."""
        # As a message: the ioctl of that name would wait until the vCPU leaves the guest. To all at once, because KVM
        # finds a local APIC that the guest has not enabled by no other message.
        cdef int result = self.signal_msi(MSI_TO_ALL, MSI_NMI)
        if result < 0:
            raise HypervisorError(f"inject an NMI: {strerror(-result).decode()}")

    cdef int set_irq(self, uint32_t gsi, bint level) noexcept nogil:
        cdef kvm.kvm_irq_level line
        line.irq = gsi
        line.level = level
        return -errno if kvm.ioctl(self.fd, kvm.KVM_IRQ_LINE, &line) < 0 else 0

    cdef int signal_msi(self, uint64_t address, uint32_t data) noexcept nogil:
        cdef kvm.kvm_msi message
        memset(&message, 0, sizeof(message))
        message.address_lo = <uint32_t>address
        message.address_hi = <uint32_t>(address >> 32)
        message.data = data
        return -errno if kvm.ioctl(self.fd, kvm.KVM_SIGNAL_MSI, &message) < 0 else 0

    cdef int assign_doorbell(self, int fd, bint is_pio, uint64_t address, bint assign) noexcept nogil:
        cdef kvm.kvm_ioeventfd request
        memset(&request, 0, sizeof(request))
        request.addr = address
        request.len = 0  # a write of any width
        request.fd = fd
        if is_pio:
            request.flags |= kvm.KVM_IOEVENTFD_FLAG_PIO
        if not assign:
            request.flags |= kvm.KVM_IOEVENTFD_FLAG_DEASSIGN
        return -errno if kvm.ioctl(self.fd, kvm.KVM_IOEVENTFD, &request) < 0 else 0

    cdef int route_msi(self, int32_t gsi, uint64_t address, uint32_t data) noexcept nogil:
        cdef uint32_t index
        cdef int result
        self.route_lock.acquire()
        if gsi < 0:
            index = self.first_msi_route
            while index < self.routes.nr and not self.routes.unused[index]:
                index += 1
            gsi = <int32_t>(FIRST_MSI_GSI + index - self.first_msi_route)
        else:
            index = <uint32_t>gsi - FIRST_MSI_GSI + self.first_msi_route
        if index >= kvm.PROPOLIS_MAX_ROUTES or index > self.routes.nr:
            result = -ENOSPC
        else:
            kvm.propolis_route_msi(&self.routes, index, <uint32_t>gsi, address, data)
            if index == self.routes.nr:
                self.routes.nr += 1
            result = -errno if kvm.ioctl(self.fd, kvm.KVM_SET_GSI_ROUTING, &self.routes) < 0 else gsi
            self.routes.unused[index] = result < 0
        self.route_lock.release()
        return result

    cdef void unroute_msi(self, int32_t gsi) noexcept nogil:
        cdef uint32_t index = <uint32_t>gsi - FIRST_MSI_GSI + self.first_msi_route
        if index >= self.first_msi_route and index < self.routes.nr:
            self.route_lock.acquire()
            self.routes.unused[index] = True
            self.route_lock.release()

    cdef int assign_irqfd(self, int fd, int32_t gsi, bint assign) noexcept nogil:
        cdef kvm.kvm_irqfd request
        memset(&request, 0, sizeof(request))
        request.fd = <uint32_t>fd
        request.gsi = <uint32_t>gsi
        request.flags = 0 if assign else kvm.KVM_IRQFD_FLAG_DEASSIGN
        return -errno if kvm.ioctl(self.fd, kvm.KVM_IRQFD, &request) < 0 else 0

    def close(self) -> None:
        """Ends the VM and gives back its memory; its vCPUs are closed already."""
        if self.fd >= 0:
            close(self.fd)
            self.fd = -1
        self.memory.close()

    def __dealloc__(self) -> None:
        if self.fd >= 0:
            close(self.fd)


@cython.no_gc_clear
cdef class KvmVcpu(Vcpu):
    """A vCPU of the kernel. All but vCPU 0 wait for INIT and SIPI."""

    cdef int fd
    cdef kvm.kvm_run *run_area
    cdef int run_size
    cdef PowerOn *pristine
    cdef KvmVm kvm_vm

    def __cinit__(self, Vm vm, index: int, on_event) -> None:
        self.fd = -1
        self.kvm_vm = vm
        self.run_size = self.kvm_vm.run_size
        self.fd = <int>call(self.kvm_vm.fd, kvm.KVM_CREATE_VCPU, <void *><uint64_t>index, f"create vCPU {index}")
        self.run_area = <kvm.kvm_run *>mmap(NULL, self.run_size, PROT_READ | PROT_WRITE, MAP_SHARED, self.fd, 0)
        if <void *>self.run_area == MAP_FAILED:
            self.run_area = NULL
            refused(f"map the run area of vCPU {index}")
        self.pristine = <PowerOn *>calloc(1, sizeof(PowerOn))
        if self.pristine == NULL:
            raise MemoryError

    def __dealloc__(self) -> None:
        self._release()
        free(self.pristine)

    cdef void _release(self) noexcept:
        if self.run_area != NULL:
            munmap(self.run_area, self.run_size)
            self.run_area = NULL
        if self.fd >= 0:
            close(self.fd)
            self.fd = -1

    def close(self) -> None:
        """Gives the vCPU back to the kernel; its thread has ended."""
        if self.running:
            raise HypervisorError(f"vCPU {self.index} is still running")
        self._release()

    def set_cpuid(self, entries: list) -> None:
        """Once, before anything else: the machine's CPUID. Then keeps the state at power-on for reset()."""
        cdef Cpuid cpuid
        cdef uint32_t i = 0
        if len(entries) > MAX_CPUID:
            raise HypervisorError(f"{len(entries)} CPUID entries: at most {MAX_CPUID}")
        memset(&cpuid, 0, sizeof(cpuid))
        for function, index, flags, eax, ebx, ecx, edx in entries:
            cpuid.entries[i].function = function
            cpuid.entries[i].index = index
            cpuid.entries[i].flags = flags
            cpuid.entries[i].eax = eax
            cpuid.entries[i].ebx = ebx
            cpuid.entries[i].ecx = ecx
            cpuid.entries[i].edx = edx
            i += 1
        cpuid.nent = i
        call(self.fd, kvm.KVM_SET_CPUID2, &cpuid, "set the CPUID")
        remember(self.fd, &self.kvm_vm.msr_list, self.kvm_vm.has_xcrs, self.pristine)

    def reset(self) -> None:
        """To the state at power-on; held."""
        restore(self.fd, self.kvm_vm.has_xcrs, self.pristine)

    cdef void set_immediate_exit(self, bint on) noexcept nogil:
        if self.run_area != NULL:  # a closed vCPU may still be told to stop
            kvm.kvm_run_set_immediate_exit(self.run_area, on)

    cdef int enter(self) noexcept nogil:
        cdef kvm.kvm_run *run = self.run_area
        cdef uint32_t i
        cdef int error
        if kvm.ioctl(self.fd, kvm.KVM_RUN, 0) < 0:
            error = errno
            if error == EINTR or error == EAGAIN:
                return EXIT_INTERRUPTED
            self.exit.reason = <uint32_t>(REASON_ERRNO + error)
            return EXIT_FAILED
        if run.exit_reason == kvm.KVM_EXIT_IO:
            self.exit.address = kvm.kvm_run_io_port(run)
            self.exit.size = kvm.kvm_run_io_size(run)
            self.exit.count = kvm.kvm_run_io_count(run)
            self.exit.is_write = kvm.kvm_run_io_is_out(run)
            self.exit.data = kvm.kvm_run_io_data(run)
            return EXIT_PIO
        if run.exit_reason == kvm.KVM_EXIT_MMIO:
            self.exit.address = kvm.kvm_run_mmio_address(run)
            self.exit.size = kvm.kvm_run_mmio_size(run)
            self.exit.is_write = kvm.kvm_run_mmio_is_write(run)
            self.exit.data = kvm.kvm_run_mmio_data(run)
            return EXIT_MMIO
        if run.exit_reason == kvm.KVM_EXIT_SHUTDOWN:
            return EXIT_SHUTDOWN
        if run.exit_reason == kvm.KVM_EXIT_INTR or run.exit_reason == kvm.KVM_EXIT_IRQ_WINDOW_OPEN:
            return EXIT_RETRY
        self.exit.reason = run.exit_reason
        for i in range(4):
            self.exit.detail[i] = 0
        if run.exit_reason == kvm.KVM_EXIT_INTERNAL_ERROR:
            self.exit.detail[0] = kvm.kvm_run_suberror(run)
            for i in range(3):
                self.exit.detail[i + 1] = kvm.kvm_run_internal(run, i)
        elif run.exit_reason == kvm.KVM_EXIT_FAIL_ENTRY:
            self.exit.detail[0] = kvm.kvm_run_entry_failure(run)
        elif run.exit_reason == kvm.KVM_EXIT_SYSTEM_EVENT:
            self.exit.detail[0] = kvm.kvm_run_system_event(run)
        else:
            self.exit.detail[0] = kvm.kvm_run_hardware_reason(run)
        return EXIT_FAILED

    def failure_text(self) -> str:
        """One line on the last EXIT_FAILED: what KVM said."""
        names = {
            kvm.KVM_EXIT_UNKNOWN: "unknown exit", kvm.KVM_EXIT_FAIL_ENTRY: "the processor refused to enter the guest",
            kvm.KVM_EXIT_INTERNAL_ERROR: "KVM internal error", kvm.KVM_EXIT_SYSTEM_EVENT: "unexpected system event",
        }
        suberrors = {1: "emulation failed", 2: "simultaneous exceptions", 3: "error during event delivery",
                     4: "unexpected exit reason"}
        reason, details = self.failure()
        if reason >= REASON_ERRNO:
            return f"KVM_RUN failed: {strerror(reason - REASON_ERRNO).decode()}"
        text = names.get(reason, f"KVM exit {reason}, which nothing here asked for")
        if reason == kvm.KVM_EXIT_INTERNAL_ERROR:
            return f"{text}: {suberrors.get(details[0], f'suberror {details[0]}')}"
        return f"{text}, hardware reason {details[0]:#x}"

    def get_registers(self):
        """The neutral Registers; the vCPU is parked."""
        return read_registers(self.fd)

    def set_registers(self, registers) -> None:
        """Loads the neutral Registers, APIC base untouched; the vCPU is parked."""
        load_registers(self.fd, registers)

    def instruction_bytes(self) -> bytes:
        """Up to 15 bytes at the instruction pointer; empty where it is not mapped. The vCPU is parked."""
        cdef kvm.kvm_translation translation
        registers = self.get_registers()
        memset(&translation, 0, sizeof(translation))
        linear = (registers.cs.base + registers.rip) & 0xFFFFFFFFFFFFFFFF
        translation.linear_address = linear
        if kvm.ioctl(self.fd, kvm.KVM_TRANSLATE, &translation) < 0 or not translation.valid:
            return b""
        try:
            return self.vm.memory.read(translation.physical_address, min(15, 4096 - (linear & 4095)))
        except GuestMemoryError:
            return b""
