"""The system calls that a jailed worker may make, and the BPF programs that libseccomp makes of that list.

Three answers: calls that a worker needs are allowed, some of them only with certain arguments; calls that libraries try
and can do without, such as opening a path, fail with an error number; any other ends the process.

The list was found by tracing VMs through their whole life, and then filled up with calls that give no power over
anything the process does not hold already, so that another libc does not end a VM.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import mmap
import os
import socket
import sys
import termios
from typing import TYPE_CHECKING, NamedTuple

from propolis.errors import JailError

if TYPE_CHECKING:
    import pyseccomp

# linux/seccomp.h
_SECCOMP = 317  # of x86-64
_SET_MODE_FILTER = 1
_GET_ACTION_AVAIL = 2
_FLAG_SPEC_ALLOW = 4  # or kernels before 5.16 slow the whole process down
KILL_PROCESS = 0x8000_0000
LOG = 0x7FFC_0000

_PR_SET_NAME = 15
_CLONE_VM, _CLONE_SIGHAND, _CLONE_THREAD = 0x100, 0x800, 0x10000
_CLONE_NEW = 0x7E02_0000 | 0x80  # NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET; NEWTIME
_CLONE_OTHERS = 0x2000 | 0x4000 | 0x8000 | 0x0080_0000  # PTRACE, VFORK, PARENT, UNTRACED
_AT_EMPTY_PATH = 0x1000

_OWN_PID = 0x7EED_F11D
"""Stands for the process's own number in a compiled program; no process has it: the kernel's limit is 2**22."""

# linux/kvm.h. What _kvm.pyx asks for, by where it asks.
KVM_RUN = 0xAE80
KVM_OF_VCPU_THREADS = (
    KVM_RUN,
    0x4040_AE79,  # IOEVENTFD
    0x4020_AE76,  # IRQFD
    0x4008_AE6A,  # SET_GSI_ROUTING
    0x4008_AE61,  # IRQ_LINE
    0x4020_AEA5,  # SIGNAL_MSI
    0x4020_AE46,  # SET_USER_MEMORY_REGION
)
KVM_OF_THE_LOOP = (
    0xAE00,  # GET_API_VERSION
    0xAE01,  # CREATE_VM
    0xC004_AE02,  # GET_MSR_INDEX_LIST
    0xAE03,  # CHECK_EXTENSION
    0xAE04,  # GET_VCPU_MMAP_SIZE
    0xC008_AE05,  # GET_SUPPORTED_CPUID
    0xAE41,  # CREATE_VCPU
    0xAE47,  # SET_TSS_ADDR
    0x4008_AE48,  # SET_IDENTITY_MAP_ADDR
    0xAE60,  # CREATE_IRQCHIP
    0xC208_AE62,  # GET_IRQCHIP
    0x8208_AE63,  # SET_IRQCHIP
    0x4040_AE77,  # CREATE_PIT2
    0x8070_AE9F,  # GET_PIT2
    0x4070_AEA0,  # SET_PIT2
    0x8090_AE81,  # GET_REGS
    0x4090_AE82,  # SET_REGS
    0x8138_AE83,  # GET_SREGS
    0x4138_AE84,  # SET_SREGS
    0xC018_AE85,  # TRANSLATE
    0xC008_AE88,  # GET_MSRS
    0x4008_AE89,  # SET_MSRS
    0x81A0_AE8C,  # GET_FPU
    0x41A0_AE8D,  # SET_FPU
    0x8400_AE8E,  # GET_LAPIC
    0x4400_AE8F,  # SET_LAPIC
    0x4008_AE90,  # SET_CPUID2
    0x8004_AE98,  # GET_MP_STATE
    0x4004_AE99,  # SET_MP_STATE
    0xAE9A,  # NMI
    0x8040_AE9F,  # GET_VCPU_EVENTS
    0x4040_AEA0,  # SET_VCPU_EVENTS
    0x8080_AEA1,  # GET_DEBUGREGS
    0x4080_AEA2,  # SET_DEBUGREGS
    0xAEA3,  # GET_TSC_KHZ
    0x9000_AEA4,  # GET_XSAVE
    0x5000_AEA5,  # SET_XSAVE
    0x8188_AEA6,  # GET_XCRS
    0x4188_AEA7,  # SET_XCRS
    0xC008_AEC1,  # GET_SUPPORTED_HV_CPUID
)
_OTHER_IOCTLS = (
    termios.FIONBIO,
    termios.FIOCLEX,
    termios.FIONCLEX,
    termios.FIONREAD,
    termios.TCGETS,  # isatty()
    0x8008_1272,  # BLKGETSIZE64
    0x1268,  # BLKSSZGET
    0x127B,  # BLKPBSZGET
    0x4004_54D0,  # TUNSETOFFLOAD
    0x4004_54D9,  # TUNSETQUEUE
)


class Compare(NamedTuple):
    """One argument, by its number, under a mask, is `value`."""

    argument: int
    value: int
    mask: int = 0xFFFF_FFFF_FFFF_FFFF


Rule = tuple[Compare, ...]

_SOCKET_OPTIONS = (socket.SO_KEEPALIVE, socket.SO_SNDBUF, socket.SO_RCVBUF, socket.SO_REUSEADDR, socket.SO_REUSEPORT)
_TCP_OPTIONS = (socket.TCP_NODELAY, socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_CORK)
_FCNTL_COMMANDS = (
    fcntl.F_GETFD,
    fcntl.F_SETFD,
    fcntl.F_GETFL,
    fcntl.F_SETFL,
    fcntl.F_DUPFD_CLOEXEC,
)

# -- what threads of every kind do: allocate memory, wait for locks, come and go ---------------------------------------

_OF_ALL = """
    brk munmap mremap madvise membarrier
    futex set_robust_list get_robust_list rseq sched_yield
    rt_sigprocmask rt_sigreturn sigaltstack restart_syscall
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time
    getpid gettid getrandom getcpu sched_getaffinity
    read write close
    exit exit_group
"""

_NO_CODE = ((Compare(2, 0, mmap.PROT_EXEC),),)  # memory that is executed is what was loaded before
_TO_ITSELF = ((Compare(0, _OWN_PID),),)

_CHECKED_OF_ALL: dict[str, tuple[Rule, ...]] = {
    "mmap": _NO_CODE,
    "mprotect": _NO_CODE,
    "kill": _TO_ITSELF,
    "tgkill": _TO_ITSELF,
}

# -- the process, and so its loop thread -------------------------------------------------------------------------------

_OF_THE_LOOP = """
    readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek
    fstat fstatfs fsync fdatasync fallocate ftruncate memfd_create msync
    close_range dup dup2 dup3
    poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2
    eventfd eventfd2 timerfd_create timerfd_settime timerfd_gettime pipe pipe2
    recvmsg sendmsg recvfrom sendto accept accept4 listen shutdown getsockname getpeername getsockopt
    rt_sigaction rt_sigpending
    getppid getuid geteuid getgid getegid getresuid getresgid getgroups getpgrp getpgid getsid
    getrusage getrlimit times sysinfo uname umask
"""

_CHECKED_OF_THE_LOOP: dict[str, tuple[Rule, ...]] = {
    "clone": (
        (
            Compare(
                0,
                _CLONE_VM | _CLONE_SIGHAND | _CLONE_THREAD,
                _CLONE_VM | _CLONE_SIGHAND | _CLONE_THREAD | _CLONE_NEW | _CLONE_OTHERS,
            ),
        ),
    ),
    "fcntl": tuple((Compare(1, command),) for command in _FCNTL_COMMANDS),
    "ioctl": tuple((Compare(1, request),) for request in (*KVM_OF_VCPU_THREADS, *KVM_OF_THE_LOOP, *_OTHER_IOCTLS)),
    "newfstatat": ((Compare(3, _AT_EMPTY_PATH),),),  # libc's fstat()
    "prctl": ((Compare(0, _PR_SET_NAME),),),
    "prlimit64": ((Compare(0, 0), Compare(2, 0)),),  # to read its own
    "seccomp": ((Compare(0, _SET_MODE_FILTER), Compare(1, _FLAG_SPEC_ALLOW)),),  # a thread may be told to do less
    "setsockopt": (
        *((Compare(1, socket.SOL_SOCKET), Compare(2, option)) for option in _SOCKET_OPTIONS),
        *((Compare(1, socket.IPPROTO_TCP), Compare(2, option)) for option in _TCP_OPTIONS),
    ),
    "socketpair": ((Compare(0, socket.AF_UNIX),),),
}

# -- what libraries try and can do without -----------------------------------------------------------------------------

_PATHS = """
    open openat creat stat lstat newfstatat access faccessat readlink readlinkat getcwd chdir
    mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 link linkat symlink symlinkat truncate
    chmod fchmodat chown lchown fchownat utimensat statfs getxattr lgetxattr mknod mknodat
"""
_CODE = ((Compare(2, mmap.PROT_EXEC, mmap.PROT_EXEC),),)

_REFUSED: dict[str, tuple[int, tuple[Rule, ...]]] = {
    **{
        name: (errno.EACCES, ((),)) for name in _PATHS.split() if name != "newfstatat"
    },  # a traceback looks for source files
    "newfstatat": (errno.EACCES, ((Compare(3, 0, _AT_EMPTY_PATH),),)),
    "mmap": (errno.EACCES, _CODE),
    "mprotect": (errno.EACCES, _CODE),
    "socket": (errno.EACCES, ((),)),
    "clone3": (errno.ENOSYS, ((),)),  # its flags are in memory, out of a filter's sight; libc takes clone then
    "io_uring_setup": (errno.ENOSYS, ((),)),  # libuv asks
    "openat2": (errno.ENOSYS, ((),)),
    "faccessat2": (errno.ENOSYS, ((),)),
    "statx": (errno.ENOSYS, ((),)),
    "pidfd_open": (errno.ENOSYS, ((),)),
    "futex_waitv": (errno.ENOSYS, ((),)),
    "copy_file_range": (errno.ENOSYS, ((),)),
    "sendfile": (errno.ENOSYS, ((),)),
    "sched_setaffinity": (errno.EPERM, ((),)),
    "setpriority": (errno.EPERM, ((),)),
}

# -- threads that run no Python ----------------------------------------------------------------------------------------

_ALLOWED: dict[str, tuple[str, dict[str, tuple[Rule, ...]]]] = {
    "worker": (_OF_ALL + _OF_THE_LOOP, _CHECKED_OF_ALL | _CHECKED_OF_THE_LOOP),
    "vcpu": (
        _OF_ALL + "timerfd_settime pread64 pwrite64",
        {**_CHECKED_OF_ALL, "ioctl": tuple((Compare(1, request),) for request in KVM_OF_VCPU_THREADS)},
    ),
    "io": (_OF_ALL + "preadv pwritev fdatasync fallocate", _CHECKED_OF_ALL),
}
KINDS = tuple(_ALLOWED)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


_INSTRUCTION_SIZE = 8  # struct sock_filter


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def why_missing() -> str | None:
    """What keeps filters from being used here; None where nothing does."""
    if os.uname().machine != "x86_64":
        return "seccomp filter: the list of system calls is one for x86-64"
    try:
        import pyseccomp  # noqa: F401 -- it looks for the library
    except (ImportError, RuntimeError, OSError):
        return "libseccomp: install the package libseccomp2"
    for action in (KILL_PROCESS, LOG):
        wanted = ctypes.c_uint32(action)
        if _libc.syscall(_SECCOMP, ctypes.c_uint(_GET_ACTION_AVAIL), ctypes.c_uint(0), ctypes.byref(wanted)) < 0:
            return (
                "seccomp filters: this kernel has none that end a process (CONFIG_SECCOMP_FILTER, Linux 4.14 or later)"
            )
    return None


@functools.cache
def compiled(kind: str, otherwise: int) -> bytes:
    """The BPF program for a kind of thread; what is on no list gets the action `otherwise`. Raises JailError.

    Takes some milliseconds once, in a process that many workers are forked from.
    """
    import pyseccomp

    allowed, checked = _ALLOWED[kind]
    try:
        program = pyseccomp.SyscallFilter(otherwise)
        program.set_attr(pyseccomp.Attr.ACT_BADARCH, KILL_PROCESS)
        program.set_attr(pyseccomp.Attr.CTL_OPTIMIZE, 2)  # a binary tree
        for name in allowed.split():
            _add(program, pyseccomp.ALLOW, name, ((),))
        for name, rules in checked.items():
            _add(program, pyseccomp.ALLOW, name, rules)
        for name, (error, rules) in _REFUSED.items():
            _add(program, pyseccomp.ERRNO(error), name, rules)
        fd = os.memfd_create("seccomp")
        with open(fd, "rb") as file:
            program.export_bpf(file)
            file.seek(0)
            return file.read()
    except OSError as error:
        raise JailError(f"make a seccomp filter for {kind} threads: {error.strerror}") from error


def _add(program: pyseccomp.SyscallFilter, action: int, name: str, rules: tuple[Rule, ...]) -> None:
    import pyseccomp

    number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
    if number < 0:
        return  # newer than this libseccomp: nobody here calls it then
    for rule in rules:
        arguments = [
            pyseccomp.Arg(compare.argument, pyseccomp.MASKED_EQ, compare.mask, compare.value) for compare in rule
        ]
        program.add_rule(action, number, *arguments)


def load(program: bytes) -> None:
    """Puts this thread, and all that it starts, under a compiled program. Raises JailError. Needs no_new_privs."""
    program = _for_this_process(program)
    argument = _Program(len(program) // _INSTRUCTION_SIZE, program)
    flags = ctypes.c_uint(_FLAG_SPEC_ALLOW)
    if _libc.syscall(_SECCOMP, ctypes.c_uint(_SET_MODE_FILTER), flags, ctypes.byref(argument)) < 0:
        raise JailError(f"load a seccomp filter: {os.strerror(ctypes.get_errno())}")


def _for_this_process(program: bytes) -> bytes:
    """The program with this process's number where it says _OWN_PID."""
    return program.replace(_OWN_PID.to_bytes(4, sys.byteorder), os.getpid().to_bytes(4, sys.byteorder))
