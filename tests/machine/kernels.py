"""Tiny kernels: ELF files entered by PVH in 32-bit protected mode, put together from a few instructions each.

Each function returns machine code that runs wherever it stands and goes on at its end, so that programs are made by
adding them up. They need a stack, which the boot protocol here gives them, and keep nothing in registers.
"""

from tests.unit.firmware import images

COM1 = 0x3F8
LINE_STATUS = COM1 + 5
PM1_STATUS, PM1_CONTROL = 0xB000, 0xB004
RESET_CONTROL = 0xCF9
BURST = 512  # characters; the transmitter says that it is full while there is still room for this many

STARTED = 0x5000  # a word that counts application processors
TRAMPOLINE = 0x2000  # where they begin
TABLES = 0x40_0000  # descriptors, where a kernel needs some

STOP = bytes.fromhex("fa f4 eb fd")  # cli; hlt; jmp to the hlt
SPIN = bytes.fromhex("eb fe")
TRIPLE_FAULT = bytes.fromhex("31 c0 50 50 0f 01 1c 24 b8 f8 ff 00 00 8e d8")  # no table of interrupts; ds = 0xFFF8
FAILURE = bytes.fromhex("d9 05 00 00 00 d0")  # fld from a device's memory, which no KVM emulates


def kernel(code: bytes) -> bytes:
    """An ELF file that begins with `code`."""
    load = images.phdr(offset=0x400, paddr=0x10_0000, filesz=len(code), memsz=0x2000)
    note = images.note((0x10_0000).to_bytes(8, "little"))
    return images.elf(load, notes=note, code=code)


def _int(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little")


def _jump(opcode: str, distance: int) -> bytes:
    """A jump of the two-byte-opcode form, `distance` from its end."""
    return bytes.fromhex(opcode) + distance.to_bytes(4, "little", signed=True)


def _port(port: int) -> bytes:
    return b"\x66\xba" + _int(port, 2)  # mov dx, port


def out8(port: int, value: int) -> bytes:
    """Writes a byte."""
    return _port(port) + b"\xb0" + _int(value, 1) + b"\xee"


def out16(port: int, value: int) -> bytes:
    """Writes a word."""
    return _port(port) + b"\x66\xb8" + _int(value, 2) + b"\x66\xef"


def forever(body: bytes) -> bytes:
    """Runs `body` again and again."""
    return body + _jump("e9", -len(body) - 5)


def repeat(count: int, body: bytes) -> bytes:
    """Runs `body` `count` times."""
    body = b"\x51" + body + b"\x59\x49"  # push ecx; body; pop ecx; dec ecx
    return b"\xb9" + _int(count, 4) + body + _jump("0f 85", -len(body) - 6)


def transmitter_ready() -> bytes:
    """Waits until COM1 takes characters."""
    poll = _port(LINE_STATUS) + b"\xec\xa8\x20"  # in al, dx; test al, THRE
    return poll + b"\x74" + _int(256 - len(poll) - 2, 1)


def say(text: str) -> bytes:
    """Prints `text` on COM1."""
    data = text.encode()
    assert len(data) <= BURST
    over = b"\xe8" + _int(len(data), 4) + data + b"\x5e"  # call over the text; pop esi
    return over + transmitter_ready() + b"\xb9" + _int(len(data), 4) + _port(COM1) + b"\xf3\x6e"  # rep outsb


def say_registers() -> bytes:
    """Prints the 12 characters in ebx, ecx and edx, as CPUID leaves a hypervisor's name."""
    push = b"\x52\x51\x53"  # push edx, ecx, ebx: in memory they are in the order of their letters
    out = b"\x89\xe6\xb9" + _int(12, 4) + _port(COM1) + b"\xf3\x6e"  # mov esi, esp; rep outsb
    return push + transmitter_ready() + out + b"\x83\xc4\x0c"


def cpuid(leaf: int) -> bytes:
    """The leaf's words in eax, ebx, ecx and edx."""
    return b"\xb8" + _int(leaf, 4) + b"\x31\xc9\x0f\xa2"  # xor ecx, ecx: subleaf 0


def on_key(key: str, body: bytes) -> bytes:
    """Runs `body` if al is `key`."""
    return b"\x3c" + key.encode() + _jump("0f 85", len(body)) + body


def on_input(body: bytes) -> bytes:
    """Runs `body` with a character in al, if one was typed on COM1."""
    take = _port(COM1) + b"\xec"
    return _port(LINE_STATUS) + b"\xec\xa8\x01" + _jump("0f 84", len(take + body)) + take + body


def on_power_button(body: bytes) -> bytes:
    """Runs `body` if the power button was pressed, and takes note of it."""
    body = out16(PM1_STATUS, 0x100) + body
    return _port(PM1_STATUS) + b"\x66\xed\xf6\xc4\x01" + _jump("0f 84", len(body)) + body  # in ax, dx; test ah, 1


def echo() -> bytes:
    """Prints the character in al."""
    return b"\x50" + transmitter_ready() + b"\x58" + _port(COM1) + b"\xee"


def power_off() -> bytes:
    """To S5."""
    return out16(PM1_CONTROL, 0x2000) + STOP


def reset() -> bytes:
    """By the PIIX3."""
    return out8(RESET_CONTROL, 6) + STOP


def wake_others(count: int) -> bytes:
    """Starts all other processors by INIT and SIPI, and waits until `count` have come."""
    arrived = bytes.fromhex("f0 ff 06 00 50 fa f4 eb fd")  # in real mode: lock inc word [STARTED]; cli; hlt
    put = b"".join(b"\xc6\x05" + _int(TRAMPOLINE + i, 4) + _int(byte, 1) for i, byte in enumerate(arrived))
    clear = b"\xc7\x05" + _int(STARTED, 4) + _int(0, 4)
    command = b"".join(b"\xc7\x05" + _int(0xFEE0_0300, 4) + _int(word, 4) for word in (0xC_4500, 0xC_4602))
    wait = b"\x66\x81\x3d" + _int(STARTED, 4) + _int(count, 2)  # cmp word [STARTED], count
    return put + clear + command + wait + b"\x75" + _int(256 - len(wait) - 2, 1)


def _put(address: int, value: int, size: int = 4) -> bytes:
    """mov [address], value; of 2 or 4 bytes."""
    return (b"\x66" if size == 2 else b"") + b"\xc7\x05" + _int(address, 4) + _int(value, size)


def on_nmi(body: bytes) -> bytes:
    """Runs `body` when an NMI comes, which does not go back: not every KVM can be returned to from one."""
    gdt, idt, pointers = TABLES, TABLES + 0x100, TABLES + 0x800
    segments = _put(gdt + 8, 0x0000_FFFF) + _put(gdt + 12, 0x00CF_9A00)  # 8: all memory, 32-bit code
    limits = _put(pointers, 15, 2) + _put(pointers + 2, gdt) + _put(pointers + 8, 0xFF, 2) + _put(pointers + 10, idt)
    load = b"\x0f\x01\x15" + _int(pointers, 4) + b"\x0f\x01\x1d" + _int(pointers + 8, 4)  # lgdt; lidt
    take_address = b"\xe8" + _int(len(body), 4) + body + b"\x58"  # call over it; pop eax
    gate = idt + 2 * 8
    low = b"\x66\xa3" + _int(gate, 4) + _put(gate + 2, 8, 2) + _put(gate + 4, 0x8E00, 2)  # mov [gate], ax
    high = b"\xc1\xe8\x10\x66\xa3" + _int(gate + 6, 4)  # shr eax, 16; mov [gate + 6], ax
    reload = bytes.fromhex("6a 08 e8 00 00 00 00 83 04 24 05 cb")  # push 8; call next; add [esp], 5; retf
    return segments + limits + load + take_address + low + high + reload


def monitor(greeting: str = "ready\r\n", *, button: bytes | None = None) -> bytes:
    """A kernel for most purposes: greets, echoes what is typed, obeys some keys, powers off by the power button.

    Keys: P powers off, R resets, T is a triple fault, F is what KVM cannot run, S spins with deaf ears. `button` is run
    when the power button is pressed, instead of powering off.
    """
    keys = {"P": power_off(), "R": reset(), "T": TRIPLE_FAULT, "F": FAILURE, "S": SPIN}
    obey = b"".join(on_key(key, body) for key, body in keys.items()) + echo()
    pressed = say("button\r\n") + power_off() if button is None else button
    return kernel(say(greeting) + forever(on_input(obey) + on_power_button(pressed)))
