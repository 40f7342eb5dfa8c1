"""Files that may be broken, hostile or half-written: checked reads, strict JSON, atomic writes."""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from utils.errors import AltiplanoError, ArtifactError, CheckpointError, ConfigError

# Linux reads at most 2^31 - 4096 bytes a call; a round number below it keeps offsets aligned.
_READ_CHUNK = 1 << 30


class InputFile:
    """A regular file for positioned reads, which notices when it changes underneath.

    Not memory-mapped: a file that shrinks under a mapping kills the process (SIGBUS). Every read
    opens the file anew, so that nothing has to be closed and threads may read at once.

    Attributes:
        path: the file.
        size: its length in bytes when it was first seen.
    """

    def __init__(self, path: str | Path, error: type[AltiplanoError] = ArtifactError):
        """Raises `error` at once if the path is missing, unreadable or no regular file."""
        self.path, self._error = Path(path), error
        try:
            # Before open(): opening a FIFO waits for a writer, opening a device may do anything.
            self._check_regular(os.stat(self.path))
            with self._open() as fd:
                self._state = _state(fd)
        except AltiplanoError:
            raise
        except (OSError, ValueError) as e:
            raise error(f"cannot read {self.path}: {_reason(e)}") from e
        self.size = self._state[2]

    def read(self, offset: int, n_bytes: int) -> bytearray:
        """`n_bytes` bytes from `offset`. Raises ArtifactError if the file has fewer."""
        end = offset + n_bytes
        if end > self.size:
            raise self._error(f"{self.path} is truncated: needs {end} bytes, has {self.size}")
        out = bytearray(n_bytes)
        self.read_into(offset, memoryview(out))
        return out

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fills the byte buffer `out` from `offset`.

        Raises ArtifactError if the file is too short, or is not the file first seen any more.
        """
        self.read_each([(offset, out)])

    def read_each(self, parts: Iterable[tuple[int, memoryview]]) -> None:
        """Fills each buffer from its offset. Raises as `read_into`."""
        need = 0
        try:
            with self._open() as fd:
                for offset, out in parts:
                    done = 0
                    while done < len(out):
                        n = os.preadv(fd, [out[done : done + _READ_CHUNK]], offset + done)
                        if n == 0:
                            break
                        done += n
                    if done < len(out):
                        need = offset + len(out)
                        break
                unchanged = _state(fd) == self._state
        except OSError as e:
            raise self._error(f"cannot read {self.path}: {_reason(e)}") from e
        if not unchanged:
            raise self._error(f"{self.path} changed while it was being read; load it again")
        if need:
            raise self._error(f"{self.path} is truncated: needs {need} bytes, has {self.size}")

    @contextlib.contextmanager
    def _open(self) -> Iterator[int]:
        fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self._check_regular(os.fstat(fd))
            yield fd
        finally:
            os.close(fd)

    def _check_regular(self, info: os.stat_result) -> None:
        if not stat.S_ISREG(info.st_mode):
            kind = "a directory" if stat.S_ISDIR(info.st_mode) else "a pipe, socket or device"
            raise self._error(f"{self.path} is {kind}, expected a regular file")


def _state(fd: int) -> tuple[int, ...]:
    info = os.fstat(fd)
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def _reason(e: Exception) -> str:
    return (getattr(e, "strerror", None) or str(e)).lower()


def list_folder(path: str | Path) -> list[str]:
    """Sorted names of a folder. Raises ArtifactError if it is unreadable, empty or no folder."""
    try:
        names = sorted(os.listdir(path))
    except NotADirectoryError as e:
        raise ArtifactError(f"{path} is a file, expected a folder") from e
    except (OSError, ValueError) as e:
        raise ArtifactError(f"cannot read folder {path}: {_reason(e)}") from e
    if not names:
        raise ArtifactError(f"folder {path} is empty, expected a checkpoint")
    return names


def named_in(path: Path, name: Any) -> Path:
    """The path of a file that the content of the file at `path` names, in the same folder.

    A link may lead to the folder itself, or to where `path` leads: with a folder of links to another
    one, or in Hugging Face's cache, the files lie side by side there too.

    Raises:
        ArtifactError: the name is no plain file name, or leads elsewhere.
    """
    plain = isinstance(name, str) and name.isprintable() and not set(name) & set("/\\:")
    if not plain or name in ("", ".", ".."):
        raise ArtifactError(f"{path} names a file {name!r:.200}, expected a plain file name")
    real = Path(os.path.realpath(path.parent / name))
    roots = [os.path.realpath(path.parent), os.path.dirname(os.path.realpath(path))]
    if not any(real.is_relative_to(root) for root in roots):
        raise ArtifactError(
            f"{path} names {name}, a link that leaves the folder; copy the file there"
        )
    return path.parent / name


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        seen: set[str] = set()
        key = next(k for k, _ in pairs if k in seen or seen.add(k))
        raise ValueError(f"duplicate key {key!r:.200}")
    return out


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON, expected a number")


# Without duplicate keys, NaN and Infinity; raises ValueError or RecursionError.
STRICT_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)


def parse_json(data: bytes, where: str, error: type[AltiplanoError] = ConfigError) -> dict:
    """Strict JSON: UTF-8, an object, no duplicate keys, no NaN or Infinity.

    Args:
        data: the text.
        where: what the error names.
        error: what is raised.
    """
    try:
        out = STRICT_JSON.decode(data.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise error(f"{where} is not UTF-8: bad byte at {e.start}") from e
    except RecursionError as e:
        raise error(f"{where} is nested too deeply") from e
    except ValueError as e:
        raise error(f"{where} is not valid JSON: {str(e):.200}") from e
    if not isinstance(out, dict):
        raise error(f"{where}: expected a JSON object, got {type(out).__name__}")
    return out


def read_json(
    path: str | Path, *, max_bytes: int = 1 << 20, error: type[AltiplanoError] = ConfigError
) -> dict:
    """The object in a small JSON file, parsed strictly. Raises `error` for anything wrong."""
    file = InputFile(path, error)
    if file.size > max_bytes:
        raise error(f"{path} has {file.size} bytes, expected at most {max_bytes}")
    return parse_json(bytes(file.read(0, file.size)), str(path), error)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that appears at `path` whole, on disk, when the block ends; or not at all."""
    path = Path(os.path.abspath(path))
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill that appears at `path` whole, on disk, when the block ends; or not at all.

    Args:
        path: absent or an empty folder, unless `overwrite`.
        overwrite: replace what is there, once the new folder is complete.
    """
    path = Path(os.path.abspath(path))
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    old = path.with_name(f".{path.name}.old-{secrets.token_hex(4)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir()
    try:
        yield temporary
        fsync_tree(temporary)
        if overwrite and path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
        fsync(path.parent)
    finally:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def fsync_tree(folder: str | Path) -> None:
    """Every file below a folder, then every folder from the innermost out, is on disk."""
    walked = list(os.walk(folder, topdown=False))
    for parent, _, names in walked:
        for name in names:
            fsync(os.path.join(parent, name))
    for parent, _, _ in walked:
        fsync(parent)


def fsync(path: str | Path) -> None:
    """A file's content, or a folder's list of names, is on disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class FolderLock:
    """The right to write into a folder. It ends with its process, however that ends."""

    def __init__(self, path: str | Path, now: float):
        """Takes the lock.

        Args:
            path: the lock's file; made if absent, and left behind.
            now: Unix time in seconds, for whoever finds the folder taken.

        Raises:
            CheckpointError: another process holds it: its pid, host, boot id and time are named.
        """
        path = Path(path)
        self._fd: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps(_identity() | {"time": now}).encode(), 0)
        except BlockingIOError as e:
            holder = os.pread(self._fd, 1000, 0).decode(errors="replace")
            self.release()
            raise CheckpointError(
                f"{path.parent} is being written by another process, {holder}; stop that one, or"
                " choose another folder"
            ) from e
        except OSError:
            self.release()
            raise
        # A forked worker that outlives this process would go on holding the lock.
        os.register_at_fork(after_in_child=self.release)

    def release(self) -> None:
        """Gives the lock back. May be called twice."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


@contextlib.contextmanager
def reading_folder(path: str | Path) -> Iterator[None]:
    """While the block runs, `hide_folders` leaves this folder where it is.

    Raises FileNotFoundError if it is not there any more.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        # It may have been taken away between the two calls.
        if not os.path.samestat(os.fstat(fd), os.stat(path)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        yield
    finally:
        os.close(fd)


def hide_folders(paths: Sequence[Path], *, even_if_read: bool = False) -> None:
    """Renames folders of one parent to dotted names, each in one go: nobody sees half of one.

    A folder that somebody is reading is left for the next time, unless `even_if_read`.
    """
    for path in paths:
        new = path.with_name(f".{path.name}.old-{secrets.token_hex(4)}")
        if even_if_read or not path.is_dir():
            os.rename(path, new)
        else:
            _hide_unread(path, new)
    if paths:
        fsync(paths[0].parent)


def _hide_unread(path: Path, new: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(path, new)
    except BlockingIOError:
        pass  # reading_folder holds it
    finally:
        os.close(fd)


def try_writing(folder: Path) -> None:
    """Writes a small file there and removes it. Raises OSError if that is not possible."""
    probe = folder / f".probe-{secrets.token_hex(8)}"
    try:
        with open(probe, "xb") as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


def _identity() -> dict[str, Any]:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return {"pid": os.getpid(), "host": socket.gethostname(), "boot_id": boot}


def flatten(tree: Mapping[str, Any], sep: str = "/") -> dict[str, Any]:
    """The leaves of a nested dict by path, in order: {"a": {"b": 1}} gives {"a/b": 1}.

    Without recursion, since JSON may be nested deeper than Python's stack. Empty dicts are left out.
    """
    out, todo = {}, [*reversed(tree.items())]
    while todo:
        path, value = todo.pop()
        if isinstance(value, Mapping):
            todo += [(f"{path}{sep}{key}", child) for key, child in reversed(value.items())]
        else:
            out[path] = value
    return out
