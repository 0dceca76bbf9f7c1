"""The keyboard controller (Intel 8042 as in the IBM PS/2), with a keyboard and a mouse, or with nothing plugged in.

A byte for the guest waits in the output buffer, and its interrupt is up as long; the next one comes from the controller
itself, else from the keyboard, else from the mouse. Where nothing is plugged in, what is sent on comes back as "resend"
with the time-out bit, which is what the hardware says when nobody pulls the clock line: enough for resets, and for the
probes of systems that look for it. Guest accesses come from vCPU threads, input from the loop; one mutex.
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from propolis._lock cimport Lock
from propolis._bus cimport Region
from propolis._interrupts cimport IrqLine
from propolis._vmm cimport Vm
from propolis.devices._power cimport POWER_RESET
from propolis.devices._ps2_keyboard cimport Keyboard, scan_set_2
from propolis.devices._ps2_mouse cimport Mouse

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
    RELEASE = 0xF0           # in scan code set 2, before the code
    RELEASED = 0x80          # in set 1, a bit of it


cdef class Controller:
    """State behind both ports. `has_devices`: a keyboard and a mouse are plugged in."""

    cdef Vm vm
    cdef uint32_t slot               # of the machine's power events
    cdef IrqLine keyboard_line, mouse_line
    cdef Lock lock                   # taken before irq_lock; guards all below
    cdef uint8_t ram[RAM_SIZE]       # byte 0 is the command byte
    cdef uint8_t output_port
    cdef uint8_t command             # that waits for its argument, or 0
    cdef bint last_was_command
    cdef uint8_t queue[QUEUE]        # the controller's own answers
    cdef uint8_t marks[QUEUE]        # status bits of each byte
    cdef uint32_t head, used
    cdef bint is_full                # the output buffer, which is:
    cdef uint8_t output, output_marks
    cdef bint was_release            # the keyboard's last byte was the prefix RELEASE, which waits for its code
    cdef uint8_t set_1[256]          # by code of scan code set 2
    cdef bint has_devices
    cdef Keyboard keyboard
    cdef Mouse mouse

    def __cinit__(self, *args: object, **kwargs: object) -> None:
        self.lock = Lock()

    def __init__(self, Vm vm, slot: int, has_devices: bool = False) -> None:
        cdef uint32_t code
        self.vm = vm
        self.slot = slot
        self.has_devices = has_devices
        self.keyboard = Keyboard()
        self.mouse = Mouse()
        self.keyboard_line = IrqLine(vm, KEYBOARD_IRQ)
        self.mouse_line = IrqLine(vm, MOUSE_IRQ)
        for code in range(256):
            self.set_1[code] = <uint8_t>code  # answers and prefixes stay as they are
        for code in range(1, 128):
            self.set_1[scan_set_2(<uint8_t>code)] = <uint8_t>code
        self.set_1[0] = 0xFF     # an overrun
        self.set_1[0x02] = 0x41  # with codes of their own in set 2 no more
        self.set_1[0x7F] = 0x54
        self.reset()

    cdef uint8_t read_data(self) noexcept nogil:
        cdef uint8_t value
        self.lock.acquire()
        value = self.output  # an empty buffer repeats the last byte
        self.is_full = False
        self._drive()
        self._fill()
        self.lock.release()
        return value

    cdef uint8_t read_status(self) noexcept nogil:
        cdef uint8_t status = STATUS_UNLOCKED
        self.lock.acquire()
        if self.is_full:
            status |= STATUS_OUTPUT | self.output_marks
        if self.ram[0] & CONTROL_SYSTEM:
            status |= STATUS_SYSTEM
        if self.last_was_command:
            status |= STATUS_COMMAND
        self.lock.release()
        return status

    cdef void write_data(self, uint8_t byte) noexcept nogil:
        cdef bint is_reset = False
        cdef uint8_t command
        self.lock.acquire()
        command = self.command
        self.command = 0
        self.last_was_command = False
        if WRITE_RAM <= command < WRITE_RAM + RAM_SIZE:
            self.ram[command - WRITE_RAM] = byte
        elif command == WRITE_OUTPUT:
            self.output_port = byte
            is_reset = not byte & OUTPUT_RUN
        elif command == ECHO_KEYBOARD or command == ECHO_MOUSE:
            # An echo on the mouse's side would say that there is one: where there is none it comes back on the other.
            self._put(byte, STATUS_MOUSE if command == ECHO_MOUSE and self.has_devices else 0)
        elif command == WRITE_MOUSE:
            self.ram[0] &= <uint8_t>~CONTROL_NO_MOUSE  # sending enables it
            if self.has_devices:
                self.mouse.receive(byte)
            else:
                self._put(RESEND, STATUS_MOUSE | STATUS_TIMEOUT)
        else:
            self.ram[0] &= <uint8_t>~CONTROL_NO_KEYBOARD
            if self.has_devices:
                self.keyboard.receive(byte)
            else:
                self._put(RESEND, STATUS_TIMEOUT)
        self._fill()
        self.lock.release()
        if is_reset:
            self.vm.mailbox.post(self.slot, POWER_RESET)

    cdef void write_command(self, uint8_t byte) noexcept nogil:
        cdef bint is_reset = False
        self.lock.acquire()
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
            self._put(0 if self.has_devices else CLOCK_STUCK, 0)
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
        self._fill()
        self.lock.release()
        if is_reset:
            self.vm.mailbox.post(self.slot, POWER_RESET)

    # -- under the lock ------------------------------------------------------------------------------------------------

    cdef void _put(self, uint8_t byte, uint8_t marks) noexcept nogil:
        """An answer of the controller; lost when the guest reads none."""
        if self.used < QUEUE:
            self.queue[(self.head + self.used) % QUEUE] = byte
            self.marks[(self.head + self.used) % QUEUE] = marks
            self.used += 1

    cdef void _fill(self) noexcept nogil:
        """The next byte into the output buffer, if that is empty; the interrupts follow."""
        if not self.is_full and self.used > 0:
            self._show(self.queue[self.head], self.marks[self.head])
            self.head = (self.head + 1) % QUEUE
            self.used -= 1
        while not self.is_full and not self.ram[0] & CONTROL_NO_KEYBOARD and self.keyboard.has_byte():
            self._show_key(self.keyboard.take())
        if not self.is_full and not self.ram[0] & CONTROL_NO_MOUSE and self.mouse.has_byte():
            self._show(self.mouse.take(), STATUS_MOUSE)
        self._drive()

    cdef void _show_key(self, uint8_t byte) noexcept nogil:
        """A byte of the keyboard's. Translated, the prefix of a release shows up as a bit of the next byte."""
        if not self.ram[0] & CONTROL_TRANSLATE:
            self._show(byte, 0)
        elif byte == RELEASE:
            self.was_release = True
        else:
            self._show(self.set_1[byte] | <uint8_t>(RELEASED if self.was_release else 0), 0)
            self.was_release = False

    cdef void _show(self, uint8_t byte, uint8_t marks) noexcept nogil:
        self.output = byte
        self.output_marks = marks
        self.is_full = True

    cdef void _drive(self) noexcept nogil:
        cdef bint is_mouse = self.output_marks & STATUS_MOUSE != 0
        self.keyboard_line.set(self.is_full and not is_mouse and self.ram[0] & CONTROL_KEYBOARD_IRQ != 0)
        self.mouse_line.set(self.is_full and is_mouse and self.ram[0] & CONTROL_MOUSE_IRQ != 0)

    # -- the loop's side -----------------------------------------------------------------------------------------------

    def key(self, number: int, is_press: bool) -> None:
        """A key is pressed, repeats, or is released. `number`: see _ps2_keyboard; 0 to 255."""
        cdef uint8_t which = number
        cdef bint press = is_press
        self.lock.acquire()
        if self.has_devices:
            self.keyboard.key(which, press)
        self._fill()
        self.lock.release()

    def move(self, x: int, y: int, wheel: int, buttons: int) -> None:
        """The mouse moved to the right, up and, its wheel, towards the user. Bits of `buttons`: left, right, middle."""
        cdef int32_t right = x, up = y, turn = wheel
        cdef uint8_t down = buttons
        self.lock.acquire()
        if self.has_devices:
            self.mouse.move(right, up, turn, down)
        self._fill()
        self.lock.release()

    def stats(self) -> dict:
        """Key presses `dropped` because the guest read none."""
        cdef uint64_t dropped
        self.lock.acquire()
        dropped = self.keyboard.dropped
        self.lock.release()
        return {"dropped": dropped}

    def reset(self) -> None:
        self.lock.acquire()
        memset(self.ram, 0, RAM_SIZE)
        self.ram[0] = CONTROL_TRANSLATE | CONTROL_NO_MOUSE | CONTROL_NO_KEYBOARD | CONTROL_SYSTEM
        self.output_port = OUTPUT_POWER_ON
        self.command = 0
        self.last_was_command = self.was_release = False
        self.head = self.used = 0
        self._show(0, 0)
        self.is_full = False
        self.keyboard.power_on()
        self.mouse.power_on()
        self._drive()
        self.lock.release()


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
