"""Registers of a 16550A UART with its two 16-byte FIFOs (National Semiconductor PC16550D datasheet).

A character takes no time here: what the guest sends is in the output ring at once, and received characters below the
trigger level time out at once. Guest accesses come from vCPU threads, `receive` and `take` from the loop; one mutex.
"""

cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from propolis._lock cimport Lock
from propolis._bus cimport Region
from propolis._interrupts cimport IrqLine
from propolis._vmm cimport Vm
from propolis.devices._ring cimport ByteRing

cdef enum:
    # Registers; the first two are the divisor while DLAB is set.
    DATA = 0
    IER = 1
    IIR = 2
    LCR = 3
    MCR = 4
    LSR = 5
    MSR = 6
    SCRATCH = 7

    IER_DATA = 0x01
    IER_THRE = 0x02
    IER_LINE = 0x04
    IER_MODEM = 0x08

    IIR_NONE = 0x01
    IIR_MODEM = 0x00
    IIR_THRE = 0x02
    IIR_DATA = 0x04
    IIR_LINE = 0x06
    IIR_TIMEOUT = 0x0C
    IIR_FIFOS = 0xC0

    FCR_ENABLE = 0x01
    FCR_CLEAR_RECEIVER = 0x02

    LCR_BREAK = 0x40
    LCR_DLAB = 0x80

    MCR_LOOPBACK = 0x10
    MCR_OUT2 = 0x08

    LSR_DATA = 0x01
    LSR_OVERRUN = 0x02
    LSR_FRAMING = 0x08
    LSR_BREAK = 0x10
    LSR_ERRORS = 0x1E
    LSR_THRE = 0x20
    LSR_TEMT = 0x40
    LSR_FIFO_ERROR = 0x80

    MSR_DELTAS = 0x0F
    MSR_RING_ENDED = 0x04
    MSR_RING = 0x40
    MSR_CONNECTED = 0xB0  # CTS, DSR, DCD: what a live peer holds up

    DEFAULT_DIVISOR = 12  # 9600 baud; a kernel that guesses the speed divides by it

    FIFO_SIZE = 16
    RING_SIZE = 65536
    # The transmitter stops being empty this much early: a driver sends a FIFO at a time, and Linux's console goes on
    # after 10 ms a character whatever the line status says.
    RING_MARGIN = 1024

cdef enum UartEvent:
    UART_OUTPUT = 1      # the ring is not empty any more
    UART_INPUT_ROOM = 2  # receive() refused something and would take some now

OUTPUT = UART_OUTPUT
INPUT_ROOM = UART_INPUT_ROOM

cdef const uint8_t *TRIGGERS = [1, 4, 8, 14]


@cython.no_gc_clear
cdef class Uart(Region):
    cdef Vm vm
    cdef IrqLine line
    cdef uint32_t slot               # in the mailbox
    cdef Lock lock                   # taken before irq_lock; guards all below
    cdef uint8_t ier, fcr, lcr, mcr, msr, scratch
    cdef uint8_t dll, dlm
    cdef uint8_t overrun             # LSR_OVERRUN or 0
    cdef bint asserted               # the level of `line`, which is nobody else's
    cdef bint thre_pending           # the transmitter-empty interrupt
    cdef bint blocked                # a sender met a full ring: THRE is due when it drains
    cdef bint starved                # receive() could not place everything
    cdef uint8_t fifo[FIFO_SIZE]     # received characters; `head` is the oldest
    cdef uint8_t flags[FIFO_SIZE]    # each one's LSR error bits
    cdef uint32_t head, used
    cdef ByteRing ring               # sent characters
    cdef uint64_t dropped, overruns

    def __init__(self, Vm vm, name: str, irq: int, slot: int) -> None:
        self.name = name
        self.width = 1
        self.vm = vm
        self.line = IrqLine(vm, irq)
        self.slot = slot
        self.ring = ByteRing(RING_SIZE)
        self._power_on()

    def __cinit__(self, *args: object, **kwargs: object) -> None:
        self.lock = Lock()

    cdef void _power_on(self) noexcept nogil:
        self.ier = self.fcr = self.lcr = self.mcr = self.scratch = 0
        self.msr = MSR_CONNECTED
        self.dll = DEFAULT_DIVISOR
        self.dlm = 0
        self.thre_pending = False
        memset(self.fifo, 0, FIFO_SIZE)
        self._clear_receiver()

    # -- guest accesses ------------------------------------------------------------------------------------------------

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        cdef uint8_t value = 0
        cdef uint32_t events = 0
        self.lock.acquire()
        if offset == DATA:
            if self.lcr & LCR_DLAB:
                value = self.dll
            else:
                value = self._pop()
                events = self._offer_room()
        elif offset == IER:
            value = self.dlm if self.lcr & LCR_DLAB else self.ier
        elif offset == IIR:
            value = self._cause()
            if value == IIR_THRE:
                self.thre_pending = False
            if self.fcr & FCR_ENABLE:
                value |= IIR_FIFOS
        elif offset == LCR:
            value = self.lcr
        elif offset == MCR:
            value = self.mcr
        elif offset == LSR:
            value = self._line_status()
            self.overrun = 0
            self.flags[self.head] = 0
        elif offset == MSR:
            value = self.msr
            self.msr &= <uint8_t>~MSR_DELTAS
        else:
            value = self.scratch
        self._drive()
        self.lock.release()
        if events:
            self.vm.mailbox.post(self.slot, events)
        return value

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        cdef uint8_t byte = <uint8_t>(value & 0xFF)
        cdef uint32_t events = 0
        self.lock.acquire()
        if offset == DATA:
            if self.lcr & LCR_DLAB:
                self.dll = byte
            else:
                events = self._send(byte)
        elif offset == IER:
            if self.lcr & LCR_DLAB:
                self.dlm = byte
            else:
                if byte & IER_THRE and not self.ier & IER_THRE and self._has_ring_room():
                    self.thre_pending = True
                self.ier = byte & 0x0F
        elif offset == IIR:
            events = self._control_fifos(byte)
        elif offset == LCR:
            if byte & LCR_BREAK and not self.lcr & LCR_BREAK and self.mcr & MCR_LOOPBACK:
                self._push(0, LSR_BREAK | LSR_FRAMING)
            self.lcr = byte
        elif offset == MCR:
            self.mcr = byte & 0x1F
            self._set_modem_lines()
            events = self._offer_room()
        elif offset == SCRATCH:
            self.scratch = byte
        self._drive()
        self.lock.release()
        if events:
            self.vm.mailbox.post(self.slot, events)

    # -- under the lock ------------------------------------------------------------------------------------------------

    cdef uint32_t _depth(self) noexcept nogil:
        return FIFO_SIZE if self.fcr & FCR_ENABLE else 1

    cdef bint _has_ring_room(self) noexcept nogil:
        return self.ring.used() <= RING_SIZE - RING_MARGIN

    cdef uint32_t _send(self, uint8_t byte) noexcept nogil:
        """The guest wrote a character. Returns events for the loop."""
        cdef uint32_t events = 0
        self.thre_pending = True  # empty again at once, unless the ring is
        if self.mcr & MCR_LOOPBACK:
            self._push(byte, 0)
            return 0
        if self.ring.used() == RING_SIZE:
            self.dropped += 1
        elif self.ring.put(byte):
            events = UART_OUTPUT
        if not self._has_ring_room():
            self.thre_pending = False
            self.blocked = True
        return events

    cdef void _push(self, uint8_t byte, uint8_t flags) noexcept nogil:
        """A character arrives whether or not there is room. A full FIFO keeps what it has, a lone buffer does not."""
        if self.used == self._depth():
            self.overrun = LSR_OVERRUN
            self.overruns += 1
            if self.fcr & FCR_ENABLE:
                return
            self.used = 0
        self.fifo[(self.head + self.used) & (FIFO_SIZE - 1)] = byte
        self.flags[(self.head + self.used) & (FIFO_SIZE - 1)] = flags
        self.used += 1

    cdef uint8_t _pop(self) noexcept nogil:
        cdef uint8_t byte = self.fifo[self.head]  # an empty FIFO repeats the last one
        if self.used > 0:
            byte = self.fifo[self.head]
            self.flags[self.head] = 0
            self.used -= 1
            if self.used > 0:
                self.head = (self.head + 1) & (FIFO_SIZE - 1)
        return byte

    cdef void _clear_receiver(self) noexcept nogil:
        self.head = self.used = 0
        self.overrun = 0
        memset(self.flags, 0, FIFO_SIZE)

    cdef uint32_t _control_fifos(self, uint8_t byte) noexcept nogil:
        if (byte ^ self.fcr) & FCR_ENABLE or byte & FCR_CLEAR_RECEIVER:
            self._clear_receiver()
        # Without the enable bit the rest is not programmed.
        self.fcr = <uint8_t>(byte & 0xC9) if byte & FCR_ENABLE else 0
        return self._offer_room()

    cdef uint32_t _offer_room(self) noexcept nogil:
        """Returns the event when receive() refused something that it would take now."""
        if self.starved and not self.mcr & MCR_LOOPBACK and self.used < self._depth():
            self.starved = False
            return UART_INPUT_ROOM
        return 0

    cdef uint8_t _line_status(self) noexcept nogil:
        cdef uint8_t status = self.overrun
        cdef uint32_t i
        if self.used > 0:
            status |= LSR_DATA | self.flags[self.head]
        if self._has_ring_room():
            status |= LSR_THRE | LSR_TEMT
        if self.fcr & FCR_ENABLE:
            for i in range(self.used):
                if self.flags[(self.head + i) & (FIFO_SIZE - 1)]:
                    status |= LSR_FIFO_ERROR
        return status

    cdef void _set_modem_lines(self) noexcept nogil:
        """In loopback the four outputs feed the four inputs; else a peer that is ready does."""
        cdef uint8_t lines = MSR_CONNECTED
        cdef uint8_t changed
        if self.mcr & MCR_LOOPBACK:
            # DTR to DSR, RTS to CTS, OUT1 to RI, OUT2 to DCD.
            lines = (self.mcr & 0x01) << 5 | (self.mcr & 0x02) << 3 | (self.mcr & 0x0C) << 4
        changed = (self.msr ^ lines) & 0xF0
        if changed & lines & MSR_RING:
            changed ^= MSR_RING  # only the end of a ring counts
        self.msr = lines | (self.msr & MSR_DELTAS) | changed >> 4

    cdef uint8_t _cause(self) noexcept nogil:
        """The interrupt of the highest priority, as the low bits of IIR."""
        if self.ier & IER_LINE and self._line_status() & LSR_ERRORS:
            return IIR_LINE
        if self.ier & IER_DATA and self.used > 0:
            if not self.fcr & FCR_ENABLE or self.used >= TRIGGERS[self.fcr >> 6]:
                return IIR_DATA
            return IIR_TIMEOUT
        if self.ier & IER_THRE and self.thre_pending:
            return IIR_THRE
        if self.ier & IER_MODEM and self.msr & MSR_DELTAS:
            return IIR_MODEM
        return IIR_NONE

    cdef void _drive(self) noexcept nogil:
        # OUT2 opens the PC's interrupt driver; loopback forces the pin off.
        cdef bint level = self.mcr & (MCR_OUT2 | MCR_LOOPBACK) == MCR_OUT2 and self._cause() != IIR_NONE
        if level != self.asserted:  # most accesses change nothing: those do not take the machine's lock of interrupts
            self.asserted = level
            self.line.set(level)

    # -- the loop's side -----------------------------------------------------------------------------------------------

    def receive(self, const uint8_t[::1] data) -> int:
        """Characters from outside. Returns how many were taken; INPUT_ROOM comes when more would be."""
        cdef uint32_t taken = 0
        cdef uint32_t length = <uint32_t>min(data.shape[0], FIFO_SIZE)
        self.lock.acquire()
        while taken < length and self.used < self._depth() and not self.mcr & MCR_LOOPBACK:
            self._push(data[taken], 0)
            taken += 1
        self.starved = taken < data.shape[0]
        self._drive()
        self.lock.release()
        return taken

    def receive_break(self) -> None:
        """A break condition from outside: a NUL character with its mark."""
        self.lock.acquire()
        if not self.mcr & MCR_LOOPBACK:
            self._push(0, LSR_BREAK | LSR_FRAMING)
        self._drive()
        self.lock.release()

    def take(self, limit: int) -> bytes:
        """What the guest sent, at most `limit` bytes. OUTPUT announces more, or the rest."""
        data, more = self.ring.take(limit)
        self.lock.acquire()
        if self.blocked and self._has_ring_room():
            self.blocked = False
            self.thre_pending = True
            self._drive()
        self.lock.release()
        if more:
            self.vm.mailbox.post(self.slot, UART_OUTPUT)
        return data

    def reset(self) -> None:
        """To the state at power-on; what the guest has sent stays to be taken."""
        cdef uint32_t events
        self.lock.acquire()
        self._power_on()
        events = self._offer_room()
        self._drive()
        self.lock.release()
        if events:
            self.vm.mailbox.post(self.slot, events)

    def stats(self) -> dict:
        """Characters lost: `dropped` by a guest that ignored THRE, `overruns` by its own loopback."""
        cdef uint64_t dropped, overruns
        self.lock.acquire()
        dropped = self.dropped
        overruns = self.overruns
        self.lock.release()
        return {"dropped": dropped, "overruns": overruns}
