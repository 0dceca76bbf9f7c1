from typing import Self

from propolis.display._surface import Surface

class Format:
    def __new__(
        cls,
        bits: int,
        depth: int,
        is_big_endian: bool,
        red_max: int,
        green_max: int,
        blue_max: int,
        red_shift: int,
        green_shift: int,
        blue_shift: int,
    ) -> Self: ...

def raw(surface: Surface, x: int, y: int, width: int, height: int, form: Format) -> bytes: ...
def zrle(surface: Surface, x: int, y: int, width: int, height: int, form: Format) -> bytes: ...
def check(surface: Surface, x: int, y: int, width: int, height: int) -> None: ...
