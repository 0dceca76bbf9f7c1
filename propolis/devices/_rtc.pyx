"""Registers of the MC146818 real-time clock with 128 bytes of battery-backed memory, as a PC has it at 0x70 and 0x71.

Time is the host's UTC clock plus an offset that the guest changes by setting the clock. Flags are worked out when
somebody looks, and a timer wakes the loop only for an interrupt that the guest enabled; it is not set again before the
guest has read register C, so a guest that lets interrupts lie costs nothing.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from propolis._lock cimport Lock
from propolis._bus cimport Region
from propolis._interrupts cimport IrqLine
from propolis._vmm cimport Vm
from propolis.devices._calendar cimport Date, date_of, seconds_of
from propolis.devices._timer cimport Timer, monotonic_ns, realtime_ns

cdef enum:
    SECONDS = 0
    SECONDS_ALARM = 1
    MINUTES = 2
    MINUTES_ALARM = 3
    HOURS = 4
    HOURS_ALARM = 5
    WEEKDAY = 6
    DAY = 7
    MONTH = 8
    YEAR = 9
    REGISTER_A = 10
    REGISTER_B = 11
    REGISTER_C = 12
    REGISTER_D = 13
    CENTURY = 0x32

    A_UIP = 0x80
    A_RATE = 0x0F
    A_DIVIDER_RESET = 0x60  # both bits set
    A_POWER_ON = 0x26       # 32768 Hz, periodic rate 1024 Hz

    B_SET = 0x80
    B_UPDATE = 0x10
    B_BINARY = 0x04
    B_24_HOURS = 0x02
    B_INTERRUPTS = 0x70     # the enable bits stand where the flags do

    C_IRQ = 0x80
    C_PERIODIC = 0x40
    C_ALARM = 0x20
    C_UPDATE = 0x10

    D_VALID = 0x80
    ALARM_ANY = 0xC0
    PM = 0x80
    IRQ = 8

    SECOND = 1000000000
    HALF_SECOND = 500000000
    # The registers change at the second; in progress means 244 us of warning and 1984 us of work before it.
    UPDATE_WINDOW = 2228000
    LONGEST_WAIT = 10  # seconds: the host's clock may be set meanwhile

    RAM_SIZE = 128

cdef int64_t LATEST = 9000000000  # in the year 2255: 64 bits of nanoseconds end in 2262


cdef class Rtc(Region):
    cdef readonly Timer timer
    cdef IrqLine line
    cdef Lock lock                    # taken before irq_lock; guards all below
    cdef uint8_t ram[RAM_SIZE]        # alarms, NVRAM, and the time registers while the clock is stopped
    cdef uint8_t provided[RAM_SIZE]   # what the machine puts there, again after each reset
    cdef bint is_provided[RAM_SIZE]
    cdef uint8_t index, a, b, flags
    cdef bint divider_was_reset
    cdef int64_t standing_ns          # what the host's clock shows while a test has it stand still, else 0
    cdef int64_t offset_ns            # guest time less host time
    cdef int64_t checked_second       # guest time up to which flags are worked out
    cdef uint64_t checked_tick        # the same of the periodic rate

    def __cinit__(self, *args: object, **kwargs: object) -> None:
        self.lock = Lock()

    def __init__(self, Vm vm) -> None:
        self.name = "rtc"
        self.width = 1
        self.timer = Timer()
        self.line = IrqLine(vm, IRQ)
        self.reset()

    # -- guest accesses ------------------------------------------------------------------------------------------------

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        cdef uint8_t value
        if offset == 0:
            return 0xFF  # the index is write-only
        self.lock.acquire()
        if self.index == REGISTER_A:
            value = self.a | <uint8_t>(A_UIP if self._is_updating() else 0)
        elif self.index == REGISTER_B:
            value = self.b
        elif self.index == REGISTER_C:
            self._catch_up()
            value = self.flags | <uint8_t>(C_IRQ if self.flags & self.b & B_INTERRUPTS else 0)
            self.flags = 0
            self._settle()
        elif self.index == REGISTER_D:
            value = D_VALID
        elif is_time(self.index) and not self._is_stopped():
            value = self._time_register(self.index)
        else:
            value = self.ram[self.index]
        self.lock.release()
        return value

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        cdef uint8_t byte = <uint8_t>(value & 0xFF)
        cdef int64_t fraction
        self.lock.acquire()
        if offset == 0:
            self.index = byte & 0x7F  # bit 7 masks NMI on a PC
        elif self.index == REGISTER_A or self.index == REGISTER_B:
            self._catch_up()
            self._control(byte)
            self._settle()
        elif self.index == REGISTER_C or self.index == REGISTER_D:
            pass  # read-only
        elif is_time(self.index) and not self._is_stopped():
            self._catch_up()
            fraction = self._now() % SECOND
            self._freeze()
            self.ram[self.index] = byte
            self._thaw(fraction)
            self._settle()
        else:
            self._catch_up()
            self.ram[self.index] = byte
            self._settle()
        self.lock.release()

    # -- under the lock ------------------------------------------------------------------------------------------------

    cdef int64_t _host(self) noexcept nogil:
        return self.standing_ns if self.standing_ns else realtime_ns()

    cdef int64_t _now(self) noexcept nogil:
        return max(0, self._host() + self.offset_ns)

    cdef bint _is_stopped(self) noexcept nogil:
        return self.b & B_SET != 0 or self.a & A_DIVIDER_RESET == A_DIVIDER_RESET

    cdef bint _is_updating(self) noexcept nogil:
        return not self._is_stopped() and self._now() % SECOND >= SECOND - UPDATE_WINDOW

    cdef void _control(self, uint8_t byte) noexcept nogil:
        """A write to register A or B: the clock may stop or start."""
        cdef bint was_stopped = self._is_stopped()
        cdef int64_t fraction = self._now() % SECOND
        if self.index == REGISTER_A:
            self.a = byte & 0x7F
            self.checked_tick = self._tick()
        else:
            self.b = byte
            if byte & B_SET:
                self.b &= <uint8_t>~B_UPDATE
        if self.a & A_DIVIDER_RESET == A_DIVIDER_RESET:
            self.divider_was_reset = True
        if self._is_stopped() and not was_stopped:
            self._freeze()
        elif was_stopped and not self._is_stopped():
            # After a reset of the divider the first second is half a second long.
            self._thaw(HALF_SECOND if self.divider_was_reset else fraction)
            self.divider_was_reset = False

    cdef uint8_t _encode(self, int64_t value) noexcept nogil:
        return <uint8_t>(value if self.b & B_BINARY else value // 10 << 4 | value % 10)

    cdef int64_t _decode(self, uint8_t value) noexcept nogil:
        return value if self.b & B_BINARY else (value >> 4) * 10 + (value & 0x0F)

    cdef int64_t _decode_hour(self, uint8_t value) noexcept nogil:
        if self.b & B_24_HOURS:
            return self._decode(value)
        return self._decode(value & 0x7F) % 12 + (12 if value & PM else 0)

    cdef uint8_t _field(self, const Date *date, uint8_t index) noexcept nogil:
        if index == SECONDS:
            return self._encode(date.second)
        if index == MINUTES:
            return self._encode(date.minute)
        if index == HOURS:
            if self.b & B_24_HOURS:
                return self._encode(date.hour)
            return self._encode((date.hour + 11) % 12 + 1) | <uint8_t>(PM if date.hour >= 12 else 0)
        if index == WEEKDAY:
            return self._encode(date.weekday)
        if index == DAY:
            return self._encode(date.day)
        if index == MONTH:
            return self._encode(date.month)
        if index == YEAR:
            return self._encode(date.year % 100)
        return self._encode(date.year // 100)

    cdef uint8_t _time_register(self, uint8_t index) noexcept nogil:
        cdef Date date = date_of(self._now() // SECOND)
        return self._field(&date, index)

    cdef void _freeze(self) noexcept nogil:
        """The time registers hold what they show."""
        cdef Date date = date_of(self._now() // SECOND)
        cdef uint8_t index
        for index in range(SECONDS, REGISTER_A):
            if is_time(index):
                self.ram[index] = self._field(&date, index)
        self.ram[CENTURY] = self._field(&date, CENTURY)

    cdef void _thaw(self, int64_t fraction) noexcept nogil:
        """The clock goes on from what the time registers hold; the weekday follows from the date."""
        cdef Date date = Date(
            year=self._decode(self.ram[CENTURY]) * 100 + self._decode(self.ram[YEAR]),
            month=self._decode(self.ram[MONTH]),
            day=self._decode(self.ram[DAY]),
            weekday=0,
            hour=self._decode_hour(self.ram[HOURS]),
            minute=self._decode(self.ram[MINUTES]),
            second=self._decode(self.ram[SECONDS]),
        )
        self.checked_second = min(seconds_of(&date), LATEST)
        self.offset_ns = self.checked_second * SECOND + fraction - self._host()

    cdef uint32_t _rate_shift(self) noexcept nogil:
        """The period is 2^n ticks of 32768 Hz; 0 for none."""
        cdef uint32_t rate = self.a & A_RATE
        if rate == 0:
            return 0
        if rate <= 2:
            return rate + 6
        return rate - 1

    cdef uint64_t _tick(self) noexcept nogil:
        """How many periods have passed since some time long ago."""
        cdef uint64_t now = monotonic_ns()
        return (now // SECOND * 32768 + now % SECOND * 32768 // SECOND) >> self._rate_shift()

    cdef int64_t _until_alarm(self, int64_t second) noexcept nogil:
        """Seconds from `second`, exclusive, to the next alarm; -1 when the alarm is none that a clock shows."""
        cdef bint any_hour = self.ram[HOURS_ALARM] >= ALARM_ANY
        cdef bint any_minute = self.ram[MINUTES_ALARM] >= ALARM_ANY
        cdef bint any_second = self.ram[SECONDS_ALARM] >= ALARM_ANY
        cdef int64_t hour = self._decode_hour(self.ram[HOURS_ALARM])
        cdef int64_t minute = self._decode(self.ram[MINUTES_ALARM])
        cdef int64_t last = self._decode(self.ram[SECONDS_ALARM])
        cdef int64_t start = second % 86400
        cdef int64_t at = start + 1
        if not any_hour and hour > 23 or not any_minute and minute > 59 or not any_second and last > 59:
            return -1
        while at <= start + 86400:  # by hours, then minutes, then seconds: some 200 steps at most
            if not any_hour and at // 3600 % 24 != hour:
                at = (at // 3600 + 1) * 3600
            elif not any_minute and at // 60 % 60 != minute:
                at = (at // 60 + 1) * 60
            elif not any_second and at % 60 != last:
                at += 1
            else:
                return at - start
        return -1

    cdef void _catch_up(self) noexcept nogil:
        """Sets the flags of what has happened since the last time."""
        cdef int64_t second, until
        cdef uint64_t tick
        if not self._is_stopped():
            second = self._now() // SECOND
            if second > self.checked_second:
                self.flags |= C_UPDATE
                until = self._until_alarm(self.checked_second)
                if 0 <= until <= second - self.checked_second:
                    self.flags |= C_ALARM
            self.checked_second = second
        if self._rate_shift():
            tick = self._tick()
            if tick != self.checked_tick and self.a & A_DIVIDER_RESET != A_DIVIDER_RESET:
                self.flags |= C_PERIODIC
            self.checked_tick = tick

    cdef void _settle(self) noexcept nogil:
        """The line follows the flags, and the timer is set for the next one that the guest waits for."""
        cdef uint64_t wait = ~<uint64_t>0
        cdef uint64_t ticks, now
        cdef int64_t until, left
        if self.flags & self.b & B_INTERRUPTS:
            self.timer.disarm()
            self.line.set(True)
            return
        self.line.set(False)
        if not self._is_stopped():
            now = <uint64_t>self._now()
            left = SECOND - <int64_t>(now % SECOND)
            if self.b & C_UPDATE:
                wait = <uint64_t>left
            elif self.b & C_ALARM:
                until = self._until_alarm(<int64_t>(now // SECOND))
                if until > 0:
                    wait = <uint64_t>(min(until, LONGEST_WAIT) - 1) * SECOND + <uint64_t>left
        if self.b & C_PERIODIC and self._rate_shift() and self.a & A_DIVIDER_RESET != A_DIVIDER_RESET:
            ticks = (self.checked_tick + 1) << self._rate_shift()
            now = monotonic_ns()
            ticks = ticks // 32768 * SECOND + ticks % 32768 * SECOND // 32768 + 1
            wait = min(wait, ticks - now if ticks > now else 1)
        if wait == ~<uint64_t>0:
            self.timer.disarm()
        else:
            self.timer.arm(wait)

    # -- the loop's side -----------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """The timer expired. Periods that were missed meanwhile count as one."""
        self.timer.drain()
        self.lock.acquire()
        self._catch_up()
        self._settle()
        self.lock.release()

    def stand_still(self, host_ns: int) -> None:
        """Takes the host's clock to show this, for good: for tests, of which a busy host would miss milliseconds."""
        self.lock.acquire()
        self.standing_ns = host_ns
        self.lock.release()

    def provide(self, index: int, value: int) -> None:
        """Puts a byte into the NVRAM, now and after each reset."""
        if not REGISTER_D < index < RAM_SIZE or index == CENTURY:
            raise ValueError(f"no NVRAM byte {index:#x}")
        self.provided[<uint32_t>index] = value
        self.is_provided[<uint32_t>index] = True
        self.ram[<uint32_t>index] = value

    def reset(self) -> None:
        """To the state at power-on. The clock goes on, and the NVRAM keeps what the machine did not put there."""
        cdef uint32_t i
        self.lock.acquire()
        self.index = self.flags = 0
        self.a = A_POWER_ON
        self.b = B_24_HOURS
        self.divider_was_reset = False
        memset(self.ram, 0, REGISTER_A)
        for i in range(<uint32_t>RAM_SIZE):
            if self.is_provided[i]:
                self.ram[i] = self.provided[i]
        self.checked_second = self._now() // SECOND
        self.checked_tick = self._tick()
        self._settle()
        self.lock.release()


cdef bint is_time(uint8_t index) noexcept nogil:
    return index == CENTURY or index <= YEAR and index != SECONDS_ALARM and index != MINUTES_ALARM \
        and index != HOURS_ALARM
