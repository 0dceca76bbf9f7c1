"""A keyboard controller with nothing plugged in: enough for resets, and for the probes of systems that look for it.

The controller answers its own commands. What is sent on to a keyboard or mouse comes back as "resend" with the time-out
bit, which is what the hardware says when nobody pulls the clock line.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from propolis._posix cimport (
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_t,
    pthread_mutex_unlock,
)
from propolis._bus cimport Region
from propolis._interrupts cimport IrqLine
from propolis._vmm cimport Vm
from propolis.devices._power cimport POWER_RESET

cdef enum:
    QUEUE = 16
    RAM_SIZE = 32
    KEYBOARD_IRQ = 1
    MOUSE_IRQ = 12

    STATUS_OUTPUT = 0x01
    STATUS_SYSTEM = 0x04     # the self-test has passed
    STATUS_COMMAND = 0x08    # the last write was to the command port
    STATUS_UNLOCKED = 0x10
    STATUS_MOUSE = 0x20
    STATUS_TIMEOUT = 0x40

    CONTROL_KEYBOARD_IRQ = 0x01
    CONTROL_MOUSE_IRQ = 0x02
    CONTROL_SYSTEM = 0x04
    CONTROL_NO_KEYBOARD = 0x10
    CONTROL_NO_MOUSE = 0x20
    CONTROL_TRANSLATE = 0x40

    READ_RAM = 0x20          # to 0x3F; byte 0 is the command byte
    WRITE_RAM = 0x60         # to 0x7F
    DISABLE_MOUSE = 0xA7
    ENABLE_MOUSE = 0xA8
    TEST_MOUSE = 0xA9
    SELF_TEST = 0xAA
    TEST_KEYBOARD = 0xAB
    DISABLE_KEYBOARD = 0xAD
    ENABLE_KEYBOARD = 0xAE
    READ_INPUT = 0xC0
    READ_OUTPUT = 0xD0
    WRITE_OUTPUT = 0xD1
    ECHO_KEYBOARD = 0xD2
    ECHO_MOUSE = 0xD3
    WRITE_MOUSE = 0xD4
    A20_OFF = 0xDD
    A20_ON = 0xDF
    READ_TEST = 0xE0
    PULSE = 0xF0             # to 0xFF: the clear bits among the lower four are the lines to pulse

    OUTPUT_RUN = 0x01        # low: the processors are in reset
    OUTPUT_A20 = 0x02
    OUTPUT_POWER_ON = 0xC3

    SELF_TEST_PASSED = 0x55
    CLOCK_STUCK = 0x01
    INPUT_PORT = 0x80
    RESEND = 0xFE


cdef class Controller:
    """State behind both ports."""

    cdef Vm vm
    cdef uint32_t slot               # of the machine's power events
    cdef IrqLine keyboard_line, mouse_line
    cdef pthread_mutex_t lock        # taken before irq_lock; guards all below
    cdef uint8_t ram[RAM_SIZE]       # byte 0 is the command byte
    cdef uint8_t output_port
    cdef uint8_t command             # that waits for its argument, or 0
    cdef bint last_was_command
    cdef uint8_t queue[QUEUE]
    cdef uint8_t marks[QUEUE]        # status bits of each byte
    cdef uint32_t head, used

    def __cinit__(self, *args: object, **kwargs: object) -> None:
        pthread_mutex_init(&self.lock, NULL)

    def __dealloc__(self) -> None:
        pthread_mutex_destroy(&self.lock)

    def __init__(self, Vm vm, slot: int) -> None:
        self.vm = vm
        self.slot = slot
        self.keyboard_line = IrqLine(vm, KEYBOARD_IRQ)
        self.mouse_line = IrqLine(vm, MOUSE_IRQ)
        self.reset()

    cdef uint8_t read_data(self) noexcept nogil:
        cdef uint8_t value
        pthread_mutex_lock(&self.lock)
        value = self.queue[self.head]  # an empty buffer repeats the last byte
        if self.used > 0:
            self.used -= 1
            if self.used > 0:
                self.head = (self.head + 1) % QUEUE
                self._drive(False)  # an edge for each byte
        self._drive(True)
        pthread_mutex_unlock(&self.lock)
        return value

    cdef uint8_t read_status(self) noexcept nogil:
        cdef uint8_t status = STATUS_UNLOCKED
        pthread_mutex_lock(&self.lock)
        if self.used > 0:
            status |= STATUS_OUTPUT | self.marks[self.head]
        if self.ram[0] & CONTROL_SYSTEM:
            status |= STATUS_SYSTEM
        if self.last_was_command:
            status |= STATUS_COMMAND
        pthread_mutex_unlock(&self.lock)
        return status

    cdef void write_data(self, uint8_t byte) noexcept nogil:
        cdef bint is_reset = False
        cdef uint8_t command
        pthread_mutex_lock(&self.lock)
        command = self.command
        self.command = 0
        self.last_was_command = False
        if WRITE_RAM <= command < WRITE_RAM + RAM_SIZE:
            self.ram[command - WRITE_RAM] = byte
        elif command == WRITE_OUTPUT:
            self.output_port = byte
            is_reset = not byte & OUTPUT_RUN
        elif command == ECHO_KEYBOARD or command == ECHO_MOUSE:
            # An echo on the mouse's side would say that there is one: it comes back on the keyboard's.
            self._put(byte, 0)
        elif command == WRITE_MOUSE:
            self._put(RESEND, STATUS_MOUSE | STATUS_TIMEOUT)
        else:
            self.ram[0] &= <uint8_t>~CONTROL_NO_KEYBOARD  # sending to the keyboard enables it
            self._put(RESEND, STATUS_TIMEOUT)
        self._drive(True)
        pthread_mutex_unlock(&self.lock)
        if is_reset:
            self.vm.mailbox.post(self.slot, POWER_RESET)

    cdef void write_command(self, uint8_t byte) noexcept nogil:
        cdef bint is_reset = False
        pthread_mutex_lock(&self.lock)
        self.command = 0
        self.last_was_command = True
        if READ_RAM <= byte < READ_RAM + RAM_SIZE:
            self._put(self.ram[byte - READ_RAM], 0)
        elif WRITE_RAM <= byte < WRITE_RAM + RAM_SIZE or WRITE_OUTPUT <= byte <= WRITE_MOUSE:
            self.command = byte
        elif byte == DISABLE_MOUSE:
            self.ram[0] |= CONTROL_NO_MOUSE
        elif byte == ENABLE_MOUSE:
            self.ram[0] &= <uint8_t>~CONTROL_NO_MOUSE
        elif byte == TEST_MOUSE:
            self._put(CLOCK_STUCK, 0)
        elif byte == SELF_TEST:
            self.ram[0] |= CONTROL_SYSTEM
            self._put(SELF_TEST_PASSED, 0)
        elif byte == TEST_KEYBOARD or byte == READ_TEST:
            self._put(0, 0)
        elif byte == DISABLE_KEYBOARD:
            self.ram[0] |= CONTROL_NO_KEYBOARD
        elif byte == ENABLE_KEYBOARD:
            self.ram[0] &= <uint8_t>~CONTROL_NO_KEYBOARD
        elif byte == READ_INPUT:
            self._put(INPUT_PORT, 0)
        elif byte == READ_OUTPUT:
            self._put(self.output_port, 0)
        elif byte == A20_OFF:
            self.output_port &= <uint8_t>~OUTPUT_A20
        elif byte == A20_ON:
            self.output_port |= OUTPUT_A20
        elif byte >= PULSE:
            is_reset = not byte & OUTPUT_RUN
        self._drive(True)
        pthread_mutex_unlock(&self.lock)
        if is_reset:
            self.vm.mailbox.post(self.slot, POWER_RESET)

    cdef void _put(self, uint8_t byte, uint8_t marks) noexcept nogil:
        """Under the lock: a byte for the guest; lost when the guest reads none."""
        if self.used == QUEUE:
            return
        if self.used == 0:
            self.head = (self.head + 1) % QUEUE
        self.queue[(self.head + self.used) % QUEUE] = byte
        self.marks[(self.head + self.used) % QUEUE] = marks
        self.used += 1

    cdef void _drive(self, bint on) noexcept nogil:
        cdef bint is_mouse = self.marks[self.head] & STATUS_MOUSE != 0
        on = on and self.used > 0
        self.keyboard_line.set(on and not is_mouse and self.ram[0] & CONTROL_KEYBOARD_IRQ != 0)
        self.mouse_line.set(on and is_mouse and self.ram[0] & CONTROL_MOUSE_IRQ != 0)

    def reset(self) -> None:
        cdef uint32_t i
        pthread_mutex_lock(&self.lock)
        for i in range(<uint32_t>RAM_SIZE):
            self.ram[i] = 0
        for i in range(<uint32_t>QUEUE):
            self.queue[i] = self.marks[i] = 0
        self.ram[0] = CONTROL_TRANSLATE | CONTROL_NO_MOUSE | CONTROL_NO_KEYBOARD | CONTROL_SYSTEM
        self.output_port = OUTPUT_POWER_ON
        self.command = 0
        self.last_was_command = False
        self.head = self.used = 0
        self._drive(False)
        pthread_mutex_unlock(&self.lock)


cdef class DataPort(Region):
    """0x60."""

    cdef Controller controller

    def __init__(self, Controller controller) -> None:
        self.name = "i8042 data"
        self.width = 1
        self.controller = controller

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        return self.controller.read_data()

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        self.controller.write_data(<uint8_t>(value & 0xFF))


cdef class CommandPort(Region):
    """0x64."""

    cdef Controller controller

    def __init__(self, Controller controller) -> None:
        self.name = "i8042 command"
        self.width = 1
        self.controller = controller

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        return self.controller.read_status()

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        self.controller.write_command(<uint8_t>(value & 0xFF))
