"""A folder as a store: positioned reads straight into the caller's memory, writes that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import secrets
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Literal

from typing_extensions import Buffer

from jobs.errors import (
    AccessDenied,
    BadInput,
    MergeyardError,
    ObjectChanged,
    ObjectExists,
    ObjectMissing,
    StorageError,
    StorageUnavailable,
)
from workers.storage.direct import BLOCK, DirectWriter, can_write_directly
from workers.storage.keys import check_key, check_prefix, length_within
from workers.storage.mapping import Mapping
from workers.storage.store import ObjectInfo

OPEN_FILES = 32
LARGEST_SYSTEM_READ = 1 << 30  # Linux moves at most 2 GiB - 4 KiB in one call
WRITE_BUFFER_BYTES = 1 << 20
WRITEBACK_BYTES = 32 << 20
FIRST_WRITEBACK_BYTES = 8 << 20  # shows soon whether the cache is slow
SLOW_WRITEBACK_SECONDS = 0.05  # of CPU time for so many bytes: 0.01 is common
PARTIAL = ".partial"
LOCK = ".lock"
NO_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}  # of Lustre without `-o flock`, and of some NFS
HELD_SECONDS = 10.0  # a lock by name is held for milliseconds: one that stays for so long was left by a dead process


class LocalStore:
    """The files under one folder. An ETag is (inode, time of change in ns, size), checked on the open file.

    Unfinished files are named `.NAME.NONCE.partial` and are locked by their writer; together with the lock files of
    `swap` (`.NAME.lock`) they are not objects. On a file system without `flock`, a lock is a file that only one
    process can create (`.NAME.held.lock`), and `sweep` ends living uploads too, as on S3.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = _OpenFiles()

    @property
    def url(self) -> str:
        return str(self._folder)

    @property
    def pinned_url(self) -> str:
        return str(self._folder)

    def locate(self, key: str) -> ObjectInfo:
        path = self._path(key)
        with _readable_errors(path):
            file = self._files.open(path)
            return ObjectInfo(key, file.size, file.etag)

    def read(self, key: str, *, start: int = 0, length: int | None = None, etag: str | None = None) -> Buffer:
        path = self._path(key)
        with _readable_errors(path):
            file = self._opened(path, etag)
            wanted = length_within(str(path), file.size, start, length)
            if wanted > LARGEST_SYSTEM_READ:
                whole = bytearray(wanted)
                file.read_into(memoryview(whole), start)
                return whole
            return file.read(start, wanted)

    def read_into(self, key: str, buffer: memoryview, *, start: int = 0, etag: str | None = None) -> None:
        path = self._path(key)
        with _readable_errors(path):
            file = self._opened(path, etag)
            length_within(str(path), file.size, start, buffer.nbytes)
            file.read_into(buffer.cast("B"), start)

    def mapped(self, key: str, *, start: int, length: int, etag: str | None = None) -> MappedBytes | None:
        """The bytes that `read` would copy, where they lie; None if there are none, or the system does not map them."""
        path = self._path(key)
        with _readable_errors(path):
            file = self._opened(path, etag)
            length_within(str(path), file.size, start, length)
            return file.mapped(start, length) if length else None

    def _opened(self, path: Path, etag: str | None) -> _OpenFile:
        """The file; `ObjectChanged` before a word about its size if it is another version."""
        file = self._files.open(path)
        if etag is not None and etag != file.etag:
            raise file.changed()
        return file

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for path in self._walk(prefix):
            if not _is_hidden(path.name):
                with suppress(ObjectMissing), _readable_errors(path):
                    found, outside = path.stat(), _outside(path, self._folder)
                    if stat.S_ISREG(found.st_mode):  # neither a pipe nor a device
                        key = path.relative_to(self._folder).as_posix()
                        yield ObjectInfo(key, found.st_size, _etag(found), outside)

    def write(self, key: str, data: Buffer, *, mode: Literal["create", "overwrite"] = "overwrite") -> ObjectInfo:
        with self.upload(key, mode=mode) as upload:
            upload.write(data)
            return upload.commit()

    def swap(self, key: str, data: Buffer, *, etag: str) -> ObjectInfo:
        with self.upload(key) as upload:
            upload.write(data)
            return upload.publish(lambda: upload.replace_if(etag))

    def upload(self, key: str, *, mode: Literal["create", "overwrite"] = "overwrite") -> LocalUpload:
        return LocalUpload(key, self._path(key), mode)

    def delete(self, key: str) -> None:
        """Also removes the object's lock file and the folders that it leaves empty, as if they had never been."""
        path = self._path(key)
        with suppress(ObjectMissing), _readable_errors(path):
            path.unlink(missing_ok=True)
            _lock_path(path).unlink(missing_ok=True)
            for folder in path.parents:
                if folder == self._folder or not _removed_if_empty(folder):
                    break

    def sweep(self, prefix: str = "") -> int:
        partials = [path for path in self._walk(prefix, of_partials=True) if path.name.endswith(PARTIAL)]
        return sum(_remove_if_dead(path) for path in partials if _is_hidden(path.name))

    def check_writable(self) -> None:
        folder = self._existing()
        if not folder.is_dir():
            raise BadInput(f"{self.url}: {folder} is a file, not a folder; choose another path")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise AccessDenied(f"{self.url}: the folder {folder} cannot be written; choose another path")

    def _existing(self) -> Path:
        """The folder, or the nearest one above it that exists."""
        return next(folder for folder in (self._folder, *self._folder.parents) if folder.exists())

    def free_bytes(self) -> int | None:
        folder = self._existing()
        with _readable_errors(folder):
            room = os.statvfs(folder)
        return room.f_bavail * room.f_frsize

    def _path(self, key: str) -> Path:
        path = self._folder / check_key(key)
        if _is_hidden(path.name):
            raise BadInput(f"object key {key!r} is not allowed: the name is kept for unfinished files")
        return path

    def _walk(self, prefix: str, *, of_partials: bool = False) -> Iterator[Path]:
        """Every file whose key begins with `prefix`; a partial is taken under the name that it would get."""
        top = self._folder / check_prefix(prefix).rpartition("/")[0]
        with _readable_errors(top):
            if self._folder.is_file():
                raise BadInput(f"{self._folder} is a file, not a folder; name the folder that holds it")
            if not top.is_dir():
                return
        for folder, _, names in os.walk(top, onerror=_raise_readable):
            for name in names:
                path = Path(folder, name)
                shown = path.with_name(name[1:]) if of_partials and name.startswith(".") else path
                if shown.relative_to(self._folder).as_posix().startswith(prefix):
                    yield path


class LocalUpload:
    """A file being written beside its final name, locked for as long as its writer lives."""

    def __init__(self, key: str, path: Path, mode: Literal["create", "overwrite"]) -> None:
        self._key = key
        self._path = path
        self._mode = mode
        self._partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL}")
        self._open = True
        self._written = self._on_its_way = 0
        self._due = FIRST_WRITEBACK_BYTES
        """Bytes that are written when the next writeback begins."""
        self._seconds = 0.0
        """CPU time of writes to the page cache since the last writeback."""
        self._direct: DirectWriter | None = None
        self._to_be_direct = False
        with _readable_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            self._file = os.fdopen(descriptor, "wb", buffering=WRITE_BUFFER_BYTES)
            _flocked(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def write(self, data: Buffer) -> None:
        """Goes on past the page cache where this took much CPU time, as for fresh memory."""
        if not self._open:
            raise ValueError(f"{self._path}: the upload has ended")
        view = memoryview(data)
        if not view.nbytes:
            return
        view = view.cast("B")
        with _readable_errors(self._path):
            if self._direct is not None:
                self._direct.write(view)
                return
            head = view[: -self._written % BLOCK] if self._to_be_direct else view
            began = time.thread_time()  # without the waiting for Python's lock
            self._written += self._file.write(head)
            self._seconds += time.thread_time() - began
            if self._to_be_direct and self._written % BLOCK == 0:
                self._file.flush()
                self._direct = DirectWriter(self._file.fileno(), self._written)
                self._direct.write(view[len(head) :])
            elif self._written >= self._due:
                self._start_writeback()

    def commit(self) -> ObjectInfo:
        return self.publish(self.place_if_absent if self._mode == "create" else self.replace)

    def abort(self) -> None:
        if self._open:
            self._open = False
            self._partial.unlink(missing_ok=True)
            with suppress(OSError):  # bytes that could not be flushed were to be thrown away
                self._file.close()

    def publish(self, appear: Callable[[], None]) -> ObjectInfo:
        """Flush to the disk, let `appear` give the file its name, and flush the folder."""
        try:
            with _readable_errors(self._path):
                self._file.flush()
                if self._direct is not None:
                    self._direct.finish()
                self._stamp(time.time_ns())
                os.fsync(self._file.fileno())
                try:
                    appear()
                except FileNotFoundError:  # swept away where there are no locks
                    raise StorageUnavailable(
                        f"{self._path}: the upload was aborted by another writer; run again"
                    ) from None
                found = os.fstat(self._file.fileno())
                _flush_folder(self._path.parent)
        finally:
            self.abort()
        return ObjectInfo(self._key, found.st_size, _etag(found))

    def replace(self) -> None:
        """Take the name, whoever has it; waits for a `swap` of the same object to finish."""
        if _lock_path(self._path).exists():
            with _locked(self._path):
                self._partial.replace(self._path)
        else:
            self._partial.replace(self._path)

    def place_if_absent(self) -> None:
        """Take the name if it is free, else `ObjectExists`."""
        try:
            os.link(self._partial, self._path)
        except FileExistsError:
            raise ObjectExists(f"{self._path} is already there") from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            self._place_if_absent_without_links()

    def replace_if(self, etag: str) -> None:
        """Take the name if the file there is still the version `etag`, else `ObjectChanged`."""
        with _locked(self._path):
            current = self._path.stat() if self._path.exists() else None
            if current is None or _etag(current) != etag:
                raise ObjectChanged(f"{self._path} was replaced by another writer")
            # inodes are reused, so only a time that always rises keeps an old ETag from coming back
            self._stamp(max(time.time_ns(), current.st_mtime_ns + 1))
            self._partial.replace(self._path)

    def _place_if_absent_without_links(self) -> None:
        with _locked(self._path):
            if self._path.exists():
                raise ObjectExists(f"{self._path} is already there")
            self._partial.replace(self._path)

    def _stamp(self, nanoseconds: int) -> None:
        # the kernel's own stamps move in steps of milliseconds: two writes in one step would look the same
        os.utime(self._file.fileno(), ns=(nanoseconds, nanoseconds))

    def _start_writeback(self) -> None:
        # Linux then begins to write these pages to the disk, so that the last fsync finds little left to do
        length = self._written - self._on_its_way
        with suppress(OSError):
            os.posix_fadvise(self._file.fileno(), self._on_its_way, length, os.POSIX_FADV_DONTNEED)
        slow = self._seconds > SLOW_WRITEBACK_SECONDS * length / WRITEBACK_BYTES
        self._to_be_direct = slow and can_write_directly(self._file.fileno())
        self._on_its_way, self._due, self._seconds = self._written, self._written + WRITEBACK_BYTES, 0.0

    def __enter__(self) -> LocalUpload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


class MappedBytes:
    """Bytes of a file where they lie, as `data`: to be used until `release`, and to be believed after it."""

    def __init__(self, file: _OpenFile, mapping: Mapping, start: int, length: int) -> None:
        self._file, self._mapping = file, mapping
        self._place = start, length
        self.data = mapping.part(start, length)

    def are_cached(self) -> bool:
        """Whether the last of them, and so most likely all, are in the page cache.

        Of others, `read_into` asks the disk for more at once than their use would.
        """
        return self._mapping.is_cached(sum(self._place) - 1)

    def release(self) -> None:
        """`ObjectChanged` if the file was changed since it was opened, `StorageError` if it could not be read."""
        self._mapping.release(*self._place)
        with _readable_errors(self._file.path):
            self._file.check_version()
            if (place := self._mapping.broken_at) is not None:
                self._file.read_into(memoryview(bytearray(1)), place)
                raise StorageUnavailable(f"{self._file.path}: a part of it could not be read for a while; run again")


class _OpenFile:
    """An open file and the version it had when it was opened; closed when the last reader lets go of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        found = os.fstat(self.descriptor)
        self.size = found.st_size
        self.etag = _etag(found)
        self._mapping: Mapping | None = None
        self._not_mapped = False

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound here: Python may be ending
        if hasattr(self, "descriptor"):
            close(self.descriptor)

    def read(self, start: int, length: int) -> bytes:
        """At most `LARGEST_SYSTEM_READ` bytes as one new object."""
        data = os.pread(self.descriptor, length, start)
        self.check_version()
        if len(data) < length:
            raise self.changed()
        return data

    def read_into(self, buffer: memoryview, start: int) -> None:
        done = 0
        while done < buffer.nbytes:
            piece = buffer[done : done + LARGEST_SYSTEM_READ]
            got = os.preadv(self.descriptor, [piece], start + done)
            if not got:
                raise self.changed()
            done += got
        self.check_version()

    def mapped(self, start: int, length: int) -> MappedBytes | None:
        """None where the system does not map the file."""
        if self._mapping is None and not self._not_mapped:
            try:
                self._mapping = Mapping(self.descriptor, self.size)
            except ValueError:
                raise self.changed() from None
            except OSError:
                self._not_mapped = True
        return None if self._mapping is None else MappedBytes(self, self._mapping, start, length)

    def check_version(self) -> None:
        """`ObjectChanged` if the file was changed in its place since it was opened."""
        if _etag(os.fstat(self.descriptor)) != self.etag:
            raise self.changed()

    def changed(self) -> ObjectChanged:
        return ObjectChanged(f"{self.path} changed while it was in use; run again to pin the new version")


class _OpenFiles:
    """The files read last, kept open; a file that was replaced under its name is opened anew."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[Path, _OpenFile] = OrderedDict()

    def open(self, path: Path) -> _OpenFile:
        named = path.stat()
        if not stat.S_ISREG(named.st_mode):
            raise ObjectMissing(f"{path} is not a file")
        with self._lock:
            file = self._files.get(path)
        if file is None or file.etag != _etag(named):
            file = _OpenFile(path)
        with self._lock:
            self._files[path] = file
            self._files.move_to_end(path)
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        return file


def _outside(path: Path, folder: Path) -> str | None:
    """The end of a symbolic link, if it is neither in `folder` nor among the `blobs` of a cache of the hub."""
    if not path.is_symlink():
        return None
    target = path.resolve()
    if target.is_relative_to(folder.resolve()) or any(_is_hub_cache(above) for above in target.parents):
        return None
    return str(target)


def _is_hub_cache(folder: Path) -> bool:
    """Whether a folder holds the blobs of one repository, or those that repositories of a cache share."""
    if folder.name != "blobs":
        return False
    return (folder.parent / "snapshots").is_dir() or next(folder.parent.glob("models--*/"), None) is not None


def _etag(found: os.stat_result) -> str:
    return f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}"


def _is_hidden(name: str) -> bool:
    return name.startswith(".") and name.endswith((PARTIAL, LOCK))


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}{LOCK}")


def _removed_if_empty(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False
    return True


@contextmanager
def _locked(path: Path) -> Generator[None, None, None]:
    """Alone with the object among all processes of this machine (and of an NFS share) that ask for it."""
    descriptor = os.open(_lock_path(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        by_name = not _flocked(descriptor, fcntl.LOCK_EX)
        with _locked_by_name(path) if by_name else nullcontext():
            yield
    finally:
        os.close(descriptor)


def _flocked(descriptor: int, how: int) -> bool:
    """Lock an open file; False where the file system has no locks."""
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        return False
    return True


@contextmanager
def _locked_by_name(path: Path) -> Generator[None, None, None]:
    """As `_locked`, without `flock`: the lock is a file that one process alone can create."""
    lock = path.with_name(f".{path.name}.held{LOCK}")
    seen, since = (0, 0), time.monotonic()
    while True:
        try:
            os.close(os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
            break
        except FileExistsError:
            pass
        with suppress(FileNotFoundError):
            found = lock.stat()
            holder = (found.st_ino, found.st_mtime_ns)
            if holder != seen:
                seen, since = holder, time.monotonic()
            elif time.monotonic() - since > HELD_SECONDS:
                lock.unlink()
        time.sleep(random.uniform(0.001, 0.01))
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system whose folders need no flush
            raise
    finally:
        os.close(descriptor)


def _remove_if_dead(partial: Path) -> bool:
    """Remove a partial file that no living writer has locked; whether it was removed."""
    with suppress(ObjectMissing, BlockingIOError), _readable_errors(partial):
        descriptor = os.open(partial, os.O_RDWR | os.O_CLOEXEC)
        try:
            _flocked(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # without locks nobody knows: as on S3, its writer ends
            partial.unlink()
            return True
        finally:
            os.close(descriptor)
    return False


@contextmanager
def _readable_errors(path: Path) -> Generator[None, None, None]:
    """Turn the system's refusals into errors that name the file and the remedy."""
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        raise _readable(error, path) from error


def _readable(error: OSError, path: Path) -> MergeyardError:
    match error.errno:
        case errno.ENOENT | errno.ELOOP:  # a link that leads nowhere, or to itself
            return ObjectMissing(f"{path} does not exist")
        case errno.EACCES | errno.EPERM:
            return AccessDenied(f"{path}: permission denied; give this user access to it")
        case errno.EROFS:
            return AccessDenied(f"{path} is on a read-only file system; choose another output folder")
        case errno.ENOTDIR | errno.EEXIST:
            return BadInput(f"{path}: a part of this path is a file, not a folder; choose another path")
        case errno.EISDIR | errno.ENOTEMPTY:
            return BadInput(f"{path} is a folder, not a file; choose another path")
        case errno.ENAMETOOLONG:
            return BadInput(f"{path}: the name is too long for this file system; choose a shorter one")
        case errno.ENOSPC | errno.EDQUOT:
            return StorageError(f"{path.parent}: no room left on this disk; free some and run again")
        case errno.ESTALE | errno.ETIMEDOUT | errno.EMFILE | errno.ENFILE:
            return StorageUnavailable(f"{path}: {os.strerror(error.errno)}; run again")
        case _:
            return StorageError(f"{path}: {error.strerror or error}")


def _raise_readable(error: OSError) -> None:
    if error.errno != errno.ENOENT:  # a folder that went away while it was listed
        raise _readable(error, Path(error.filename))
