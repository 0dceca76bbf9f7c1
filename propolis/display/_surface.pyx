"""A copy of what the guest shows, and when each tile of it changed.

The guest's framebuffer is read once for all clients; what differs from the copy is copied and its tile marked with the
number of this look. A client is sent the tiles whose number is greater than that of what it was sent.
"""

from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy

from propolis._memory cimport ACCESS_READ, GuestMemory

SIDE = MAX_SIDE


cdef class Surface:
    """Black at first. Raises ValueError for a size that is none, MemoryError."""

    def __cinit__(self, width: int, height: int) -> None:
        if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
            raise ValueError(f"a screen of {width} x {height}")
        self.width = width
        self.height = height
        self.columns = (self.width + TILE - 1) // TILE
        self.rows = (self.height + TILE - 1) // TILE
        self.looks = 1
        self.pixels = <uint32_t *>calloc(<size_t>self.width * self.height, sizeof(uint32_t))
        self.changed = <uint64_t *>calloc(<size_t>self.columns * self.rows, sizeof(uint64_t))
        if self.pixels == NULL or self.changed == NULL:
            raise MemoryError
        for tile in range(self.columns * self.rows):
            self.changed[tile] = 1

    def __dealloc__(self) -> None:
        free(self.pixels)
        free(self.changed)

    def refresh(self, GuestMemory memory, gpa: int, stride: int) -> bool:
        """Looks at the guest's framebuffer of this size, rows `stride` bytes apart. Whether anything had changed.

        Memory that is not there changes nothing. Callable on any thread while nobody unmaps guest memory.
        """
        cdef uint64_t start = gpa
        cdef uint64_t step = stride
        cdef const uint8_t *source
        cdef uint32_t found = 0
        if step < <uint64_t>self.width * 4:
            return False
        with nogil:
            # Valid for as long as guest memory is mapped; the last row ends with its last pixel.
            source = memory.translate(start, step * (self.height - 1) + <uint64_t>self.width * 4, ACCESS_READ)
            if source != NULL:
                found = self._compare(source, step)
        return found != 0

    cdef uint32_t _compare(self, const uint8_t *source, uint64_t stride) noexcept nogil:
        """Copies what differs; in how many rows of tiles. What the guest writes meanwhile, the next look sees."""
        cdef uint32_t row, column, y, length, count = 0
        cdef uint64_t look = self.looks + 1
        cdef uint32_t *mine
        cdef const uint8_t *its
        cdef bint is_row_changed
        for row in range(self.rows):
            is_row_changed = False
            for y in range(row * TILE, min(row * TILE + TILE, self.height)):
                its = source + y * stride
                mine = self.pixels + <size_t>y * self.width
                if memcmp(mine, its, <size_t>self.width * 4) == 0:
                    continue
                for column in range(self.columns):
                    length = min(<uint32_t>TILE, self.width - column * TILE) * 4
                    if memcmp(mine + column * TILE, its + column * TILE * 4, length) != 0:
                        memcpy(mine + column * TILE, its + column * TILE * 4, length)
                        self.changed[row * self.columns + column] = look
                        is_row_changed = True
            count += is_row_changed
        if count:
            self.looks = look
        return count

    def rgb(self) -> bytes:
        """The whole picture, 4 bytes a pixel: blue, green, red and one that means nothing."""
        return (<const char *>self.pixels)[:<Py_ssize_t>self.width * self.height * 4]


cdef class View:
    """Of a client that has seen nothing yet."""

    def __cinit__(self, Surface surface) -> None:
        self.surface = surface
        self.sent = <uint64_t *>calloc(<size_t>surface.columns * surface.rows, sizeof(uint64_t))
        if self.sent == NULL:
            raise MemoryError

    def __dealloc__(self) -> None:
        free(self.sent)

    def forget(self, x: int, y: int, width: int, height: int) -> None:
        """The client wants all of this region again, whatever it was sent."""
        first_column, first_row, last_column, last_row = self._tiles(x, y, width, height)
        for row in range(first_row, last_row):
            for column in range(first_column, last_column):
                self.sent[<uint32_t>row * self.surface.columns + <uint32_t>column] = 0

    def unsent(self, x: int, y: int, width: int, height: int) -> list:
        """(x, y, width, height) of what changed in a region: whole tiles, a rectangle for each run in a row."""
        cdef uint32_t row, column, start
        cdef Surface surface = self.surface
        first_column, first_row, last_column, last_row = self._tiles(x, y, width, height)
        found = []
        for row in range(<uint32_t>first_row, <uint32_t>last_row):
            column = <uint32_t>first_column
            while column < <uint32_t>last_column:
                if not self._is_unsent(row, column):
                    column += 1
                    continue
                start = column
                while column < <uint32_t>last_column and self._is_unsent(row, column):
                    column += 1
                found.append((
                    start * TILE,
                    row * TILE,
                    min(column * TILE, surface.width) - start * TILE,
                    min(row * TILE + TILE, surface.height) - row * TILE,
                ))
        return found

    def note_sent(self, x: int, y: int, width: int, height: int) -> None:
        """These tiles go to the client as they are now."""
        first_column, first_row, last_column, last_row = self._tiles(x, y, width, height)
        for row in range(first_row, last_row):
            for column in range(first_column, last_column):
                self.sent[<uint32_t>row * self.surface.columns + <uint32_t>column] = self.surface.looks

    cdef bint _is_unsent(self, uint32_t row, uint32_t column):
        cdef uint32_t tile = row * self.surface.columns + column
        return self.surface.changed[tile] > self.sent[tile]

    def _tiles(self, x: int, y: int, width: int, height: int) -> tuple:
        """First and past the last column and row of a region's tiles; what lies outside the surface is cut off."""
        right, bottom = min(x + width, self.surface.width), min(y + height, self.surface.height)
        if x < 0 or y < 0 or right <= x or bottom <= y:
            return 0, 0, 0, 0
        return x // TILE, y // TILE, (right + TILE - 1) // TILE, (bottom + TILE - 1) // TILE
