"""Pixels as a client of RFB wants them: raw (RFC 6143 §7.7.1), and in the tiles of ZRLE (§7.7.6) before compression."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memset

from propolis.display._surface cimport TILE, Surface

cdef enum:
    TILE_PIXELS = 4096       # TILE * TILE
    MAX_PALETTE = 127
    PACKED_PALETTE = 16      # entries up to which pixels are packed
    SLOTS = 256              # of the table by which a colour's index is found
    PLAIN_RLE = 128          # subencodings
    PALETTE_RLE = 130 - 2    # plus the size of the palette


cdef class Format:
    """A pixel format. Raises ValueError for one that nothing can be said in.

    `bits` is 8, 16 or 32. Each maximum is below 2^16, each shift below 32.
    """

    cdef uint32_t bits, size         # of a pixel, in bits and bytes
    cdef bint is_big_endian
    cdef bint is_native              # the guest's own: nothing is to be done but to clear the byte that means nothing
    cdef uint32_t red[256]           # by the intensity: its bits in the pixel
    cdef uint32_t green[256]
    cdef uint32_t blue[256]
    cdef uint32_t compact_size       # bytes of a CPIXEL
    cdef uint32_t compact_shift      # bits dropped from the pixel for it

    def __cinit__(
        self, bits: int, depth: int, is_big_endian: bool,
        red_max: int, green_max: int, blue_max: int, red_shift: int, green_shift: int, blue_shift: int,
    ) -> None:
        if bits not in (8, 16, 32):
            raise ValueError(f"pixels of {bits} bits: expected 8, 16 or 32")
        used = 0
        for maximum, shift in ((red_max, red_shift), (green_max, green_shift), (blue_max, blue_shift)):
            if not 0 < maximum < 1 << 16 or not 0 <= shift < bits or maximum << shift >= 1 << bits:
                raise ValueError(f"a colour up to {maximum} at bit {shift} of {bits}")
            used |= maximum << shift
        self.bits = bits
        self.size = bits // 8
        self.is_big_endian = is_big_endian
        colours = red_max, green_max, blue_max, red_shift, green_shift, blue_shift
        self.is_native = bits == 32 and not is_big_endian and colours == (255, 255, 255, 16, 8, 0)
        for value in range(256):
            self.red[value] = (value * red_max + 127) // 255 << red_shift
            self.green[value] = (value * green_max + 127) // 255 << green_shift
            self.blue[value] = (value * blue_max + 127) // 255 << blue_shift
        self.compact_size, self.compact_shift = self.size, 0
        if bits == 32 and depth <= 24:
            if used < 1 << 24:
                self.compact_size = 3
            elif used & 0xFF == 0:
                self.compact_size, self.compact_shift = 3, 8

    cdef uint32_t _pixel(self, uint32_t xrgb) noexcept nogil:
        if self.is_native:
            return xrgb & 0xFFFFFF
        return self.red[xrgb >> 16 & 0xFF] | self.green[xrgb >> 8 & 0xFF] | self.blue[xrgb & 0xFF]

    cdef uint8_t *_put(self, uint8_t *target, uint32_t value, uint32_t size) noexcept nogil:
        """`size` bytes of a pixel; where the next one goes."""
        cdef uint32_t i
        if self.is_big_endian:
            for i in range(size):
                target[size - 1 - i] = <uint8_t>(value >> 8 * i & 0xFF)
        else:
            for i in range(size):
                target[i] = <uint8_t>(value >> 8 * i & 0xFF)
        return target + size


cdef struct Palette:
    uint32_t count                   # MAX_PALETTE + 1: there are more
    uint32_t colours[128]
    uint8_t slots[SLOTS]             # index + 1, or 0


def raw(Surface surface, x: int, y: int, width: int, height: int, Format form) -> bytes:
    """A rectangle of a surface, in raw encoding. Raises ValueError where it is not all inside."""
    check(surface, x, y, width, height)
    cdef uint32_t left = x, top = y, across = width, down = height
    cdef uint32_t row, column
    cdef bytes data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>across * down * form.size)
    cdef uint8_t *target = <uint8_t *>PyBytes_AS_STRING(data)
    cdef const uint32_t *source
    with nogil:
        for row in range(top, top + down):
            source = surface.pixels + <size_t>row * surface.width + left
            if form.is_native:
                for column in range(across):
                    (<uint32_t *>target)[column] = source[column] & 0xFFFFFF
                target += <size_t>across * 4
                continue
            for column in range(across):
                target = form._put(target, form._pixel(source[column]), form.size)
    return data


def zrle(Surface surface, x: int, y: int, width: int, height: int, Format form) -> bytes:
    """A rectangle of a surface as ZRLE's tiles, to be compressed. Raises ValueError where it is not all inside."""
    check(surface, x, y, width, height)
    cdef uint32_t left = x, top = y, across = width, down = height
    cdef uint32_t row, column
    cdef uint32_t tiles = ((across + TILE - 1) // TILE) * ((down + TILE - 1) // TILE)
    # No tile takes more than one byte and its pixels: the smallest form is chosen.
    cdef bytes data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>across * down * form.compact_size + tiles)
    cdef uint8_t *start = <uint8_t *>PyBytes_AS_STRING(data)
    cdef uint8_t *target = start
    with nogil:
        for row in range((down + TILE - 1) // TILE):
            for column in range((across + TILE - 1) // TILE):
                target = encode_tile(
                    surface, left + column * TILE, top + row * TILE, min(<uint32_t>TILE, across - column * TILE),
                    min(<uint32_t>TILE, down - row * TILE), form, target,
                )
    return data[:target - start]


def check(Surface surface, x: int, y: int, width: int, height: int) -> None:
    """Raises ValueError where a rectangle is empty or not all on the surface."""
    if x < 0 or y < 0 or width < 1 or height < 1 or x + width > surface.width or y + height > surface.height:
        raise ValueError(f"{width} x {height} at {x}, {y} of a surface of {surface.width} x {surface.height}")


cdef uint8_t *encode_tile(
    Surface surface, uint32_t left, uint32_t top, uint32_t width, uint32_t height, Format form, uint8_t *target
) noexcept nogil:
    """One tile, in the form that takes least. Where the next one goes."""
    cdef uint32_t values[TILE_PIXELS]
    cdef Palette palette
    cdef uint32_t count = width * height
    cdef uint32_t size = form.compact_size
    cdef uint32_t row, column, at = 0, run = 0
    cdef uint32_t plain = 1, indexed = 1, least, packed_bits = 0
    cdef const uint32_t *source
    palette.count = 0
    memset(palette.slots, 0, SLOTS)
    for row in range(top, top + height):
        source = surface.pixels + <size_t>row * surface.width + left
        for column in range(width):
            values[at] = form._pixel(source[column]) >> form.compact_shift
            at += 1
    for at in range(count):
        if at == 0 or values[at] != values[at - 1]:
            enter(&palette, values[at])
        run += 1
        if at + 1 == count or values[at + 1] != values[at]:
            plain += size + 1 + (run - 1) // 255
            indexed += 1
            if run > 1:
                indexed += 1 + (run - 1) // 255
            run = 0
    if palette.count == 1:
        target[0] = 1
        return form._put(target + 1, values[0], size)
    least = 1 + count * size
    if palette.count <= PACKED_PALETTE:
        packed_bits = 1 if palette.count == 2 else 2 if palette.count <= 4 else 4
        if 1 + palette.count * size + height * ((width * packed_bits + 7) // 8) <= min(least, plain):
            least = 1 + palette.count * size + height * ((width * packed_bits + 7) // 8)
        else:
            packed_bits = 0
    if palette.count <= MAX_PALETTE and indexed + palette.count * size < min(least, plain):
        return put_palette_rle(values, count, &palette, form, target)
    if packed_bits:
        return put_packed(values, width, height, packed_bits, &palette, form, target)
    if plain < least:
        return put_plain_rle(values, count, form, target)
    target[0] = 0
    target += 1
    for at in range(count):
        target = form._put(target, values[at], size)
    return target


cdef void enter(Palette *palette, uint32_t value) noexcept nogil:
    """The colour becomes one of the palette, if it is not and there is room."""
    cdef uint32_t slot = value * <uint32_t>2654435761 >> 24
    if palette.count > MAX_PALETTE:
        return
    while palette.slots[slot]:
        if palette.colours[palette.slots[slot] - 1] == value:
            return
        slot = (slot + 1) % SLOTS
    if palette.count < MAX_PALETTE:
        palette.colours[palette.count] = value
        palette.slots[slot] = <uint8_t>(palette.count + 1)
    palette.count += 1


cdef uint8_t index_of(const Palette *palette, uint32_t value) noexcept nogil:
    """Of a colour that is there."""
    cdef uint32_t slot = value * <uint32_t>2654435761 >> 24
    while palette.colours[palette.slots[slot] - 1] != value:
        slot = (slot + 1) % SLOTS
    return <uint8_t>(palette.slots[slot] - 1)


cdef uint8_t *put_colours(const Palette *palette, Format form, uint8_t *target) noexcept nogil:
    cdef uint32_t i
    for i in range(palette.count):
        target = form._put(target, palette.colours[i], form.compact_size)
    return target


cdef uint8_t *put_length(uint32_t run, uint8_t *target) noexcept nogil:
    """A run's length: bytes of 255 and a last one, whose sum is one less."""
    run -= 1
    while run >= 255:
        target[0] = 255
        target += 1
        run -= 255
    target[0] = <uint8_t>run
    return target + 1


cdef uint8_t *put_plain_rle(const uint32_t *values, uint32_t count, Format form, uint8_t *target) noexcept nogil:
    cdef uint32_t at = 0, end
    target[0] = PLAIN_RLE
    target += 1
    while at < count:
        end = at + 1
        while end < count and values[end] == values[at]:
            end += 1
        target = form._put(target, values[at], form.compact_size)
        target = put_length(end - at, target)
        at = end
    return target


cdef uint8_t *put_palette_rle(
    const uint32_t *values, uint32_t count, const Palette *palette, Format form, uint8_t *target
) noexcept nogil:
    cdef uint32_t at = 0, end
    target[0] = <uint8_t>(PALETTE_RLE + palette.count)
    target = put_colours(palette, form, target + 1)
    while at < count:
        end = at + 1
        while end < count and values[end] == values[at]:
            end += 1
        target[0] = index_of(palette, values[at])
        if end - at == 1:
            target += 1
        else:
            target[0] |= 0x80
            target = put_length(end - at, target + 1)
        at = end
    return target


cdef uint8_t *put_packed(
    const uint32_t *values, uint32_t width, uint32_t height, uint32_t bits, const Palette *palette, Format form,
    uint8_t *target
) noexcept nogil:
    """Each row begins with a byte of its own; the leftmost pixel is in its highest bits."""
    cdef uint32_t row, column, byte, filled
    target[0] = <uint8_t>palette.count
    target = put_colours(palette, form, target + 1)
    for row in range(height):
        byte = filled = 0
        for column in range(width):
            byte = byte << bits | index_of(palette, values[row * width + column])
            filled += bits
            if filled == 8:
                target[0] = <uint8_t>byte
                target += 1
                byte = filled = 0
        if filled:
            target[0] = <uint8_t>(byte << (8 - filled) & 0xFF)
            target += 1
    return target
