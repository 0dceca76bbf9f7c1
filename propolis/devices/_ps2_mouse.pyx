"""A PS/2 mouse (IBM PS/2 Technical Reference, Mouse), with an IntelliMouse's wheel for drivers that knock.

What moves is added up until the guest fetches it; each change of the buttons is kept apart, a few of them. Rate,
resolution and scaling are remembered and change nothing: who points has a pointer of its own.
"""

cdef enum:
    SCALE_1_1 = 0xE6
    SCALE_2_1 = 0xE7
    SET_RESOLUTION = 0xE8
    STATUS = 0xE9
    STREAM = 0xEA
    READ_DATA = 0xEB
    END_WRAP = 0xEC
    WRAP = 0xEE
    REMOTE = 0xF0
    IDENTIFY = 0xF2
    SET_RATE = 0xF3
    ENABLE = 0xF4
    DISABLE = 0xF5
    DEFAULTS = 0xF6
    RESEND = 0xFE
    RESET = 0xFF

    ACKNOWLEDGE = 0xFA
    TEST_PASSED = 0xAA

    WITH_WHEEL = 3
    DEFAULT_RATE = 100       # reports a second
    DEFAULT_RESOLUTION = 2   # 4 counts a millimetre

    STATUS_REMOTE = 0x40
    STATUS_ENABLED = 0x20
    STATUS_SCALING = 0x10
    PACKET_ALWAYS = 0x08
    PACKET_LEFTWARDS = 0x10
    PACKET_DOWNWARDS = 0x20
    FARTHEST = 255           # one packet's move
    FARTHEST_WHEEL = 7
    FARTHEST_SUM = 1 << 20   # what is added up

cdef class Mouse:
    cdef void power_on(self) noexcept nogil:
        self.byte_count = self.first_byte = 0
        self.command = self.last = self.identity = 0
        self.buttons = 0
        self.is_wrapping = False
        self.knocks[0] = self.knocks[1] = 0
        self._defaults()

    cdef void _defaults(self) noexcept nogil:
        self._forget()
        self.told = self.buttons
        self.rate = DEFAULT_RATE
        self.resolution = DEFAULT_RESOLUTION
        self.is_reporting = self.is_remote = self.is_scaling = False

    cdef void _forget(self) noexcept nogil:
        """What has not been told. The buttons are told again if they are not as they were."""
        self.used = self.first = 0

    cdef void receive(self, uint8_t byte) noexcept nogil:
        cdef uint8_t command = self.command
        self.command = 0
        if self.is_wrapping and byte != END_WRAP and byte != RESET:
            self._put(byte)
            return
        if byte != RESEND:
            self.byte_count = 0  # a packet under way must not look like a reply
        if command:
            self._argument(command, byte)
            return
        if byte == RESEND:
            self._put(self.last)
            return
        if byte == RESET:
            self.power_on()
            self._put(ACKNOWLEDGE)
            self._put(TEST_PASSED)
            self._put(self.identity)
            return
        if byte < SCALE_1_1 or byte == 0xED or byte == 0xEF or byte == 0xF1 or byte > DEFAULTS:
            self._put(RESEND)
            return
        self._put(ACKNOWLEDGE)
        if byte == SCALE_1_1 or byte == SCALE_2_1:
            self.is_scaling = byte == SCALE_2_1
        elif byte == SET_RESOLUTION or byte == SET_RATE:
            self.command = byte
        elif byte == STATUS:
            self._put(
                <uint8_t>(STATUS_REMOTE if self.is_remote else 0)
                | <uint8_t>(STATUS_ENABLED if self.is_reporting else 0)
                | <uint8_t>(STATUS_SCALING if self.is_scaling else 0)
                | (self.buttons & 1) << 2 | (self.buttons & 4) >> 1 | (self.buttons & 2) >> 1
            )
            self._put(self.resolution)
            self._put(self.rate)
        elif byte == STREAM or byte == REMOTE:
            self._forget()
            self.is_remote = byte == REMOTE
        elif byte == READ_DATA:
            self._packet()
        elif byte == WRAP or byte == END_WRAP:
            self.is_wrapping = byte == WRAP
        elif byte == IDENTIFY:
            self._put(self.identity)
        elif byte == ENABLE:
            self._forget()
            self.is_reporting = True
        elif byte == DISABLE:
            self.is_reporting = False
        else:
            self._defaults()

    cdef void _argument(self, uint8_t command, uint8_t byte) noexcept nogil:
        if command == SET_RESOLUTION and byte > 3 or command == SET_RATE and (byte < 10 or byte > 200):
            self._put(RESEND)
            return
        if command == SET_RESOLUTION:
            self.resolution = byte
        else:
            self._knock(byte)
            self.rate = byte
        self._put(ACKNOWLEDGE)

    cdef void _knock(self, uint8_t rate) noexcept nogil:
        """Who sets the rates 200, 100 and 80 in a row knows the wheel."""
        if self.knocks[0] == 200 and self.knocks[1] == 100 and rate == 80:
            self.identity = WITH_WHEEL
        self.knocks[0] = self.knocks[1]
        self.knocks[1] = rate

    cdef bint has_byte(self) noexcept nogil:
        return self.byte_count > 0 or self.is_reporting and not self.is_remote and not self.is_wrapping and (
            self.used > 0
        )

    cdef uint8_t take(self) noexcept nogil:
        if self.byte_count == 0:
            self._packet()
        self.last = self.bytes[self.first_byte]
        self.first_byte = (self.first_byte + 1) % MOUSE_BYTES
        self.byte_count -= 1
        return self.last

    cdef void move(self, int32_t x, int32_t y, int32_t wheel, uint8_t buttons) noexcept nogil:
        cdef Move *move = &self.moves[(self.first + self.used + MOUSE_MOVES - 1) % MOUSE_MOVES]  # the latest, if any
        buttons &= 7
        self.buttons = buttons
        if not (self.is_reporting or self.is_remote):
            return
        if self.used == 0 or move.buttons != buttons and self.used < MOUSE_MOVES:
            if self.used == 0 and x == 0 and y == 0 and wheel == 0 and buttons == self.told:
                return
            move = &self.moves[(self.first + self.used) % MOUSE_MOVES]
            move.x = move.y = move.wheel = 0
            self.used += 1
        move.buttons = buttons
        move.x = within(move.x + within(x, FARTHEST_SUM), FARTHEST_SUM)
        move.y = within(move.y + within(y, FARTHEST_SUM), FARTHEST_SUM)
        move.wheel = within(move.wheel + within(wheel, FARTHEST_SUM), FARTHEST_SUM)

    cdef void _packet(self) noexcept nogil:
        """The oldest move, or as much of it as one packet says; where there is none, that nothing moved."""
        cdef int32_t x = 0, y = 0, wheel = 0
        cdef uint8_t buttons = self.buttons
        cdef Move *move
        if self.used > 0:
            move = &self.moves[self.first]
            x = within(move.x, FARTHEST)
            y = within(move.y, FARTHEST)
            wheel = within(move.wheel, FARTHEST_WHEEL)
            buttons = move.buttons
            move.x -= x
            move.y -= y
            move.wheel -= wheel
            if self.identity != WITH_WHEEL:
                move.wheel = 0
            if move.x == 0 and move.y == 0 and move.wheel == 0:
                self.first = (self.first + 1) % MOUSE_MOVES
                self.used -= 1
        self.told = buttons
        self._put(
            PACKET_ALWAYS | buttons
            | <uint8_t>(PACKET_LEFTWARDS if x < 0 else 0) | <uint8_t>(PACKET_DOWNWARDS if y < 0 else 0)
        )
        self._put(<uint8_t>(x & 0xFF))
        self._put(<uint8_t>(y & 0xFF))
        if self.identity == WITH_WHEEL:
            self._put(<uint8_t>(wheel & 0xFF))

    cdef void _put(self, uint8_t byte) noexcept nogil:
        """Lost when the guest reads none."""
        if self.byte_count < MOUSE_BYTES:
            self.bytes[(self.first_byte + self.byte_count) % MOUSE_BYTES] = byte
            self.byte_count += 1


cdef int32_t within(int32_t value, int32_t limit) noexcept nogil:
    return max(-limit, min(limit, value))
