"""The compiled filters, call by call, in an interpreter of their language; the kernel's answers are in test_jail."""

import ctypes
import errno
import mmap
import os
import re
import socket
import struct
import subprocess
from pathlib import Path

import pyseccomp
import pytest

from propolis import syscall_filter
from propolis.syscall_filter import KILL_PROCESS, LOG

TREE = Path(__file__).resolve().parents[2]
X86_64, I386 = 0xC000_003E, 0x4000_0003
X32 = 0x4000_0000
ALLOW, ERRNO = 0x7FFF_0000, 0x5_0000
ANYTHING = (0x11, 0x22, 0x7777_7777, 0x44, 0x55, 0x66)


def decide(program: bytes, number: int, *arguments: int, arch: int = X86_64) -> int:
    """What the filter answers: linux/filter.h, the few instructions that libseccomp uses."""
    arguments += ANYTHING[len(arguments) :]
    data = struct.pack("=iIQ6Q", number, arch, 0, *arguments)
    code = list(struct.iter_unpack("=HBBI", program))
    accumulator = at = 0
    while True:
        operation, true, false, constant = code[at]
        at += 1
        if operation == 0x20:  # load a word
            (accumulator,) = struct.unpack_from("=I", data, constant)
        elif operation == 0x54:  # and
            accumulator &= constant
        elif operation == 0x05:  # jump
            at += constant
        elif operation in (0x15, 0x25, 0x35):  # equal, greater, greater or equal
            holds = {0x15: accumulator == constant, 0x25: accumulator > constant, 0x35: accumulator >= constant}
            at += true if holds[operation] else false
        elif operation == 0x06:  # return
            return int(constant)
        else:
            raise AssertionError(f"an instruction {operation:#x} that is not known here")


def compiled(kind: str, otherwise: int = KILL_PROCESS) -> bytes:
    """The filter of a kind of thread."""
    return syscall_filter.compiled(kind, otherwise)


def number(name: str) -> int:
    """Of a system call of this machine."""
    found = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
    assert isinstance(found, int)
    assert found >= 0, name
    return found


def names(action: int, kind: str) -> set[str]:
    """Calls that are answered with `action` whatever their arguments are (of those tried here)."""
    program = compiled(kind)
    return {
        pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, candidate).decode()
        for candidate in range(470)
        if _is_call(candidate) and decide(program, candidate) & 0xFFFF_0000 == action
    }


def _is_call(candidate: int) -> bool:
    try:
        pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, candidate)
    except ValueError:
        return False
    return True


POWERS = """
    execve execveat fork vfork clone ptrace process_vm_readv process_vm_writev process_madvise kcmp
    mount umount2 pivot_root chroot fsopen fsmount move_mount open_tree mount_setattr unshare setns
    bpf perf_event_open keyctl add_key request_key userfaultfd modify_ldt personality arch_prctl
    init_module finit_module delete_module kexec_load reboot swapon swapoff acct quotactl
    setuid setgid setresuid setresgid setgroups setfsuid capset capget setrlimit
    bind connect sendmmsg recvmmsg pidfd_getfd pidfd_send_signal rt_sigqueueinfo rt_tgsigqueueinfo tkill
    open_by_handle_at name_to_handle_at fanotify_init inotify_init1 io_uring_enter io_uring_register io_submit
    shmget msgget semget mq_open iopl ioperm sched_setscheduler sched_setattr pkey_mprotect remap_file_pages
    fchmod fchown getdents64 fchdir fsetxattr flock splice vmsplice tee landlock_restrict_self sysfs syslog
    wait4 waitid setsid setpgid mlock mlockall mbind migrate_pages move_pages prctl seccomp kill tgkill
"""


@pytest.mark.parametrize("kind", syscall_filter.KINDS)
def test_powers_end_the_process(kind: str) -> None:
    assert set(POWERS.split()) - names(KILL_PROCESS, kind) == set()


@pytest.mark.parametrize("kind", syscall_filter.KINDS)
def test_no_call_is_for_the_kernel_alone_to_judge(kind: str) -> None:
    """Every number is answered, those that no kernel has yet too."""
    program = compiled(kind)
    for candidate in (*range(600), -1, 0x7FFF_FFFF):
        assert decide(program, candidate) & 0xFFFF_0000 in (ALLOW, ERRNO, KILL_PROCESS)
    assert decide(program, 599) == KILL_PROCESS


@pytest.mark.parametrize("kind", syscall_filter.KINDS)
def test_other_instruction_sets_end_the_process(kind: str) -> None:
    """Numbers mean something else there."""
    program = compiled(kind)
    assert decide(program, 4, arch=I386) == KILL_PROCESS  # write
    assert decide(program, X32 + number("write")) == KILL_PROCESS


def test_threads_are_allowed_less_than_the_process() -> None:
    process = names(ALLOW, "worker")
    assert names(ALLOW, "vcpu") < process
    assert names(ALLOW, "io") < process
    assert names(ALLOW, "vcpu") & {"sendmsg", "recvmsg", "pwritev", "dup3", "memfd_create", "accept4"} == set()
    assert names(ALLOW, "io") & {"sendmsg", "recvmsg", "timerfd_settime", "dup3", "memfd_create", "accept4"} == set()


def test_the_log_mode_lets_pass_what_ends_the_process_otherwise() -> None:
    program = compiled("worker", LOG)
    assert decide(program, number("ptrace")) == LOG
    assert decide(program, number("openat")) == ERRNO | errno.EACCES
    assert decide(program, 4, arch=I386) == KILL_PROCESS


DENIED = KILL_PROCESS
OWN = syscall_filter._OWN_PID
THREAD = 0x3D_0F00  # libc's flags
CHECKED = {
    "thread": ("clone", (THREAD,), ALLOW),
    "process": ("clone", (0x0120_0011,), DENIED),
    "thread in a new user namespace": ("clone", (THREAD | 0x1000_0000,), DENIED),
    "vfork": ("clone", (0x4111,), DENIED),
    "clone3": ("clone3", (), ERRNO | errno.ENOSYS),
    "signal to itself": ("kill", (OWN, 15), ALLOW),
    "signal to another": ("kill", (1, 15), DENIED),
    "signal to the process group": ("kill", (0, 15), DENIED),
    "signal to all": ("kill", (0xFFFF_FFFF_FFFF_FFFF, 15), DENIED),
    "signal to a thread": ("tgkill", (OWN, 5, 10), ALLOW),
    "signal to another's thread": ("tgkill", (5, 5, 10), DENIED),
    "memory": ("mmap", (0, 4096, mmap.PROT_READ | mmap.PROT_WRITE), ALLOW),
    "memory for code": ("mmap", (0, 4096, mmap.PROT_READ | mmap.PROT_EXEC), ERRNO | errno.EACCES),
    "memory to code": ("mprotect", (0, 4096, mmap.PROT_EXEC), ERRNO | errno.EACCES),
    "unix socket pair": ("socketpair", (socket.AF_UNIX,), ALLOW),
    "another socket pair": ("socketpair", (socket.AF_INET,), DENIED),
    "netlink": ("socket", (socket.AF_NETLINK,), ERRNO | errno.EACCES),
    "packet filter": ("setsockopt", (3, socket.SOL_SOCKET, 26), DENIED),
    "no delay": ("setsockopt", (3, socket.IPPROTO_TCP, socket.TCP_NODELAY), ALLOW),
    "fstat": ("newfstatat", (3, 0, 0, 0x1000), ALLOW),
    "stat": ("newfstatat", (3, 0, 0, 0), ERRNO | errno.EACCES),
    "keys into a terminal": ("ioctl", (0, 0x5412), DENIED),
    "run a vCPU": ("ioctl", (5, syscall_filter.KVM_RUN), ALLOW),
    "an emulated device of KVM's": ("ioctl", (5, 0xC00C_AEE0), DENIED),
    "owner of a descriptor": ("fcntl", (5, 8), DENIED),
    "duplicate": ("fcntl", (5, 1030), ALLOW),
    "name of a thread": ("prctl", (15,), ALLOW),
    "open to debuggers": ("prctl", (4, 1), DENIED),
    "own limits": ("prlimit64", (0, 7, 0), ALLOW),
    "new limits": ("prlimit64", (0, 7, 0x1000), DENIED),
    "another's limits": ("prlimit64", (1, 7, 0), DENIED),
    "a narrower filter": ("seccomp", (1, 4), ALLOW),
    "a filter that asks another process": ("seccomp", (1, 8), DENIED),
}


@pytest.mark.parametrize("what", CHECKED)
def test_arguments_are_looked_at(what: str) -> None:
    name, arguments, expected = CHECKED[what]
    assert decide(compiled("worker"), number(name), *arguments) == expected


def test_a_program_is_loaded_with_the_number_of_the_process() -> None:
    program = syscall_filter._for_this_process(compiled("worker"))
    assert decide(program, number("kill"), os.getpid(), 15) == ALLOW
    assert decide(program, number("kill"), OWN, 15) == DENIED


def test_vcpu_threads_run_vcpus_and_make_none() -> None:
    program = compiled("vcpu")
    assert {decide(program, number("ioctl"), 5, request) for request in syscall_filter.KVM_OF_VCPU_THREADS} == {ALLOW}
    assert {decide(program, number("ioctl"), 5, request) for request in syscall_filter.KVM_OF_THE_LOOP} == {DENIED}
    assert decide(compiled("io"), number("ioctl"), 5, syscall_filter.KVM_RUN) == DENIED


def test_kvm_requests_are_those_of_the_back_end(tmp_path: Path) -> None:
    """Every request that the back end declares is allowed, by the number that the kernel's header gives it."""
    declared = " ".join(re.findall(r"unsigned long (KVM_.*)", (TREE / "propolis/hypervisor/kvm.pxd").read_text()))
    requests = sorted(set(re.findall(r"KVM_\w+", declared)))
    lines = "".join(f'printf("%lu\\n", (unsigned long){name});' for name in requests)
    source = tmp_path / "requests.c"
    source.write_text(f"#include <linux/kvm.h>\n#include <stdio.h>\nint main(void) {{ {lines} return 0; }}\n")
    subprocess.run(["cc", "-o", tmp_path / "requests", source], check=True)
    printed = subprocess.run([tmp_path / "requests"], check=True, capture_output=True, text=True).stdout.split()
    expected = dict(zip(map(int, printed), requests, strict=True))
    allowed = {*syscall_filter.KVM_OF_VCPU_THREADS, *syscall_filter.KVM_OF_THE_LOOP}
    assert {name for request, name in expected.items() if request not in allowed} == set()
    assert {hex(request) for request in allowed if request not in expected} == set()


def test_a_program_fits_the_kernel() -> None:
    for kind in syscall_filter.KINDS:
        assert len(compiled(kind)) // 8 <= 4096
    assert ctypes.sizeof(syscall_filter._Program) == 16
