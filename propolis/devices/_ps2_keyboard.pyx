"""A PS/2 keyboard with 102 keys and more, in scan code sets 1 and 2 (IBM PS/2 Technical Reference, Keyboards).

A key's number is its make code in set 1, plus 0x80 where the code has the prefix E0: what the QEMU extension of RFB
sends. A press is only told while there is room for the releases of all keys that are down, so that none is ever stuck.
"""

from libc.string cimport memset

cdef enum:
    SET_LEDS = 0xED
    ECHO = 0xEE
    SCAN_CODE_SET = 0xF0
    IDENTIFY = 0xF2
    SET_RATE = 0xF3
    ENABLE = 0xF4
    DISABLE = 0xF5
    DEFAULTS = 0xF6
    FIRST_KEY_TYPE = 0xF7    # to 0xFD: which keys repeat, in set 3
    ALL_REPEAT = 0xFA
    LAST_KEY_TYPE = 0xFD
    RESEND = 0xFE
    RESET = 0xFF

    ACKNOWLEDGE = 0xFA
    TEST_PASSED = 0xAA
    IDENTITY_1 = 0xAB
    IDENTITY_2 = 0x83

    EXTENDED = 0xE0
    RELEASE = 0xF0           # before the code in set 2
    RELEASED = 0x80          # bit of the code in set 1
    LONGEST_RELEASE = 3      # bytes
    DEFAULT_RATE = 0x2B      # 10.9 a second after half a second

    PAUSE = 0xC6             # E0 46 by number; has a sequence of its own, and no release

# By code of set 1.
cdef const uint8_t *SET_2 = [
    0x00, 0x76, 0x16, 0x1E, 0x26, 0x25, 0x2E, 0x36, 0x3D, 0x3E, 0x46, 0x45, 0x4E, 0x55, 0x66, 0x0D,
    0x15, 0x1D, 0x24, 0x2D, 0x2C, 0x35, 0x3C, 0x43, 0x44, 0x4D, 0x54, 0x5B, 0x5A, 0x14, 0x1C, 0x1B,
    0x23, 0x2B, 0x34, 0x33, 0x3B, 0x42, 0x4B, 0x4C, 0x52, 0x0E, 0x12, 0x5D, 0x1A, 0x22, 0x21, 0x2A,
    0x32, 0x31, 0x3A, 0x41, 0x49, 0x4A, 0x59, 0x7C, 0x11, 0x29, 0x58, 0x05, 0x06, 0x04, 0x0C, 0x03,
    0x0B, 0x83, 0x0A, 0x01, 0x09, 0x77, 0x7E, 0x6C, 0x75, 0x7D, 0x7B, 0x6B, 0x73, 0x74, 0x79, 0x69,
    0x72, 0x7A, 0x70, 0x71, 0x84, 0x60, 0x61, 0x78, 0x07, 0x0F, 0x17, 0x1F, 0x27, 0x2F, 0x37, 0x3F,
    0x47, 0x4F, 0x56, 0x5E, 0x08, 0x10, 0x18, 0x20, 0x28, 0x30, 0x38, 0x40, 0x48, 0x50, 0x57, 0x6F,
    0x13, 0x19, 0x39, 0x51, 0x53, 0x5C, 0x5F, 0x62, 0x63, 0x64, 0x65, 0x67, 0x68, 0x6A, 0x6D, 0x6E,
]
cdef const uint8_t *PAUSE_1 = [0xE1, 0x1D, 0x45, 0xE1, 0x9D, 0xC5]
cdef const uint8_t *PAUSE_2 = [0xE1, 0x14, 0x77, 0xE1, 0xF0, 0x14, 0xF0, 0x77]


cdef uint8_t scan_set_2(uint8_t code) noexcept nogil:
    return SET_2[code] if code < 0x80 else 0


cdef class Keyboard:
    cdef void power_on(self) noexcept nogil:
        self.reply_count = self.first_reply = 0
        self.command = self.last = self.leds = 0
        self._defaults()
        self.is_scanning = True

    cdef void _defaults(self) noexcept nogil:
        self.used = self.first = 0
        memset(self.is_down, 0, sizeof(self.is_down))
        self.down = 0
        self.scan_set = 2
        self.rate = DEFAULT_RATE

    cdef void receive(self, uint8_t byte) noexcept nogil:
        cdef uint8_t command = self.command
        self.command = 0
        if command:
            self._argument(command, byte)
        elif byte == ECHO:
            self._reply(ECHO)
        elif byte == RESEND:
            self._reply(self.last)
        elif byte == SET_LEDS or byte == SCAN_CODE_SET or byte == SET_RATE or ALL_REPEAT < byte <= LAST_KEY_TYPE:
            self.command = byte
            self._reply(ACKNOWLEDGE)
        elif byte == IDENTIFY:
            self._reply(ACKNOWLEDGE)
            self._reply(IDENTITY_1)
            self._reply(IDENTITY_2)
        elif byte == ENABLE:
            self.is_scanning = True
            self._reply(ACKNOWLEDGE)
        elif byte == DISABLE or byte == DEFAULTS:
            self._defaults()
            self.is_scanning = byte == DEFAULTS
            self._reply(ACKNOWLEDGE)
        elif FIRST_KEY_TYPE <= byte <= ALL_REPEAT:
            self._reply(ACKNOWLEDGE)
        elif byte == RESET:
            self.power_on()
            self._reply(ACKNOWLEDGE)
            self._reply(TEST_PASSED)
        else:
            self._reply(RESEND)

    cdef void _argument(self, uint8_t command, uint8_t byte) noexcept nogil:
        if command == SET_LEDS:
            self.leds = byte & 7
        elif command == SET_RATE:
            self.rate = byte & 0x7F
        elif command == SCAN_CODE_SET:
            if byte > 2:
                self._reply(RESEND)
                return
            if byte:
                self.scan_set = byte
        self._reply(ACKNOWLEDGE)
        if command == SCAN_CODE_SET and byte == 0:
            self._reply(self.scan_set)

    cdef bint has_byte(self) noexcept nogil:
        return self.reply_count > 0 or self.used > 0

    cdef uint8_t take(self) noexcept nogil:
        if self.reply_count > 0:
            self.last = self.replies[self.first_reply]
            self.first_reply = (self.first_reply + 1) % KEYBOARD_REPLIES
            self.reply_count -= 1
        else:
            self.last = self.codes[self.first]
            self.first = (self.first + 1) % KEYBOARD_CODES
            self.used -= 1
        return self.last

    cdef void key(self, uint8_t number, bint is_press) noexcept nogil:
        cdef uint8_t code = number & 0x7F
        cdef uint32_t i, length
        cdef const uint8_t *pause
        if code == 0 or not self.is_scanning or not is_press and not self.is_down[number]:
            return
        if is_press:
            length = LONGEST_RELEASE
            if number == PAUSE:
                length = 8
            elif not self.is_down[number]:
                length = 2 * LONGEST_RELEASE
            if self.used + length + LONGEST_RELEASE * self.down > KEYBOARD_CODES:
                self.dropped += 1
                return
        if number == PAUSE:
            pause = PAUSE_1 if self.scan_set == 1 else PAUSE_2
            for i in range(6 if self.scan_set == 1 else 8):
                self._put(pause[i])
            return
        if is_press != self.is_down[number]:
            self.is_down[number] = is_press
            if is_press:
                self.down += 1
            else:
                self.down -= 1
        if number & 0x80:
            self._put(EXTENDED)
        if self.scan_set == 1:
            self._put(<uint8_t>(code if is_press else code | RELEASED))
            return
        if not is_press:
            self._put(RELEASE)
        self._put(SET_2[code])

    cdef void _put(self, uint8_t byte) noexcept nogil:
        """The caller saw that there is room."""
        self.codes[(self.first + self.used) % KEYBOARD_CODES] = byte
        self.used += 1

    cdef void _reply(self, uint8_t byte) noexcept nogil:
        """Lost when the guest reads none."""
        if self.reply_count < KEYBOARD_REPLIES:
            self.replies[(self.first_reply + self.reply_count) % KEYBOARD_REPLIES] = byte
            self.reply_count += 1
