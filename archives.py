"""Pictures that lie in one .zip or .tar: --image_dir may name such a file instead of a folder.

Millions of small files are slow on a shared disk, and a file system may run out of entries for them. An
archive is one file. It must be uncompressed: then a picture is a run of bytes, read from its place, by any
process, in any order, and nothing is ever unpacked.

A tar has no list of what it holds, so the first start looks through it, and keeps the list beside it.
"""
import hashlib
import io
import os
import posixpath
import tarfile
import zipfile
from array import array
from bisect import bisect_right

import numpy as np
from tqdm import tqdm

from config import BadExample, UserError, printable

VERSION = 1                                                 # raise it when the list is written otherwise
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
HOW = "Write an uncompressed one: `tar cf FILE.tar -C FOLDER .` or, in FOLDER, `zip -0 -r FILE.zip .`"


class Member(io.BytesIO):
    """A picture read from an archive: an open file that knows its name, in the place of a path."""

    def __init__(self, data, name):
        super().__init__(data)
        self.name = name

    def __str__(self):
        return self.name

    def __repr__(self):                                     # so do Pillow's errors call it
        return repr(self.name)

    def read_bytes(self):
        return self.getvalue()


class Archive:
    """The pictures of a .zip or .tar by name. As a sequence it is its names (bytes, UTF-8) in order, in which
    `bisect` finds one.

    names:  (bytes in all,) uint8, all names one behind the other.
    ends:   (n,) where each of them ends.
    places: (n, 2) where the file begins (zip: its own head, tar: its bytes), how long it is; -1 = it can't be
            read, such as a link.
    Arrays, because Python would copy a dictionary into each data worker: it counts references in each entry.
    Raises UserError where the archive is compressed, cut off, or none.
    """

    def __init__(self, path):
        self.path, self.file = path, None
        try:
            self.file = open(path, "rb", buffering=0)       # `fork` gives it to the data workers
            self.state = self._now()
            head = self.file.read(8)
            self.is_zip = head.startswith((b"PK\3\4", b"PK\5\6"))
            kind = next((kind for start, kind in COMPRESSED.items() if head.startswith(start)), "")
            if kind:
                raise UserError(f"--image_dir {path} is compressed ({kind}), so no picture can be read from "
                                f"its place. {HOW}")
            self.names, self.ends, self.places = self._load() or self._look_through()
        except UserError:
            raise
        except Exception as e:                              # of the many kinds that the two modules raise
            raise UserError(f"--image_dir {path} is no folder, and can't be read as an uncompressed .zip or "
                            f".tar ({type(e).__name__}: {printable(str(e), 300)}). If it was copied or "
                            "downloaded, do that again") from e

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        return self.names[self.ends[i - 1] if i else 0:self.ends[i]].tobytes()

    def __getstate__(self):
        """What a process that is not forked gets: it opens the file itself."""
        return self.__dict__ | {"file": None}

    def open(self, name):
        """-> Member. Names are those of the archive, as paths from its top. Raises BadExample."""
        wanted = posixpath.normpath(name)
        if wanted.startswith(("../", "/")) or wanted == "..":
            raise BadExample(f"picture {name} lies outside of --image_dir {self.path}; "
                             "such paths are refused")
        key = wanted.encode("utf-8", "surrogatepass")       # half a character is in no archive
        i = bisect_right(self, key) - 1                     # of two with one name the last, as when unpacked
        if i < 0 or self[i] != key:
            one = f", such as {self[len(self) // 2].decode('utf-8', 'replace')}" if len(self) else ""
            raise BadExample(f"picture {printable(name, 400)} does not exist in {self.path}, which holds "
                             f"{len(self):,} files{printable(one, 400)}. Names start from the archive's top")
        start, size = self.places[i].tolist()
        if size < 0:
            raise BadExample(f"picture {name} in {self.path} is a link or has holes. Make the archive with "
                             "tar's --dereference and --hard-dereference, and without --sparse")
        try:
            return Member(self._read(start, size), f"{self.path}/{wanted}")
        except OSError as e:
            raise BadExample(f"picture {name} can't be read from {self.path} now ({e}). "
                             "The same command continues") from e

    def _read(self, start, size):
        """By `pread`, which has no place in the file that processes could move under each other's hands."""
        if self.file is None:
            self.file = open(self.path, "rb", buffering=0)
        if self._now() != self.state:
            raise OSError("it was changed since the start")
        number = self.file.fileno()
        if self.is_zip:                                     # its head is of 30 bytes, a name, and more
            head = os.pread(number, 30, start)
            if head[:4] != b"PK\3\4":
                raise OSError(f"at byte {start:,} there is no file, as its list says")
            start += 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        data = os.pread(number, size, start)
        while data and len(data) < size:                    # Linux reads 2 GB at once, others less
            more = os.pread(number, size - len(data), start + len(data))
            data = data + more if more else b""
        if len(data) != size:
            raise OSError("it was cut off")
        return data

    def _now(self):
        now = os.fstat(self.file.fileno())
        return now.st_size, now.st_mtime_ns

    # -- the list of what it holds ---------------------------------------------------------------------------

    def _look_through(self):
        names, starts, sizes = [], array("q"), array("q")
        for name, start, size in self._zip() if self.is_zip else self._tar():
            names.append(posixpath.normpath(name).encode("utf-8", "surrogateescape"))
            starts.append(start), sizes.append(size)
        places = np.column_stack([np.frombuffer(numbers, np.int64) for numbers in (starts, sizes)])
        if not self._lie_inside(places):
            raise OSError("a file in it ends behind its end: it was cut off")
        order = sorted(range(len(names)), key=names.__getitem__)    # stable: of two alike the last stays last
        ends = np.cumsum([len(names[i]) for i in order], dtype=np.int64)
        found = np.frombuffer(b"".join(names[i] for i in order), np.uint8), ends, places[order]
        self._keep(*found)
        return found

    def _lie_inside(self, places):
        return (places[:, 0] >= 0).all() and (places[:, 1] <= self.state[0] - places[:, 0]).all()

    def _zip(self):
        """-> name, where its head begins, size."""
        with zipfile.ZipFile(self.path) as listed:
            files = [each for each in listed.infolist() if not each.is_dir()]
        packed = [each.filename for each in files if each.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise UserError(f"--image_dir {self.path}: {len(packed):,} of its {len(files):,} files are "
                            f"compressed, such as {printable(packed[0], 400)}. {HOW}")
        for each in files:
            # Encrypted, or a symbolic link, as its Unix mode says (the upper half of the attributes).
            odd = each.flag_bits & 1 or each.external_attr >> 28 == 0o12
            yield name_of(each), each.header_offset, -1 if odd else each.file_size

    def _tar(self):
        """-> name, where its bytes begin, size."""
        with tarfile.open(self.path, "r:") as tar:
            about = f"looking through {self.path.name}"
            for each in tqdm(iter(tar.next, None), desc=about, disable=None, delay=5):
                if not each.isdir():
                    plain = each.isreg() and not each.issparse()
                    yield each.name, each.offset_data, each.size if plain else -1
                tar.members.clear()                         # tarfile keeps them all
            # Where the list ends, a block of zeros must stand. Where tarfile can't go on it just stops.
            block = os.pread(self.file.fileno(), 512, tar.offset)
        if len(block) < 512 or any(block):
            raise OSError(f"behind byte {tar.offset:,} it is cut off or damaged")

    @property
    def kept(self):
        """Where the list is kept: the name holds what it depends on, so an old one is never taken."""
        h = hashlib.sha256(repr((self.state, VERSION)).encode()).hexdigest()[:16]
        return self.path.with_name(f".{self.path.name}.{h}.index.npz")

    def _keep(self, names, ends, places):
        unfinished = self.kept.with_suffix(f".unfinished{os.getpid()}.npz")
        try:
            np.savez(unfinished, names=names, ends=ends, places=places)
            unfinished.replace(self.kept)
        except OSError as e:                                # a folder one may not write into
            print(f"the list of {self.path} can't be kept beside it ({e.strerror}); the next start makes it "
                  "again")

    def _load(self):
        """The list that an earlier start has kept; None if there is none, or it is not whole."""
        try:
            with np.load(self.kept, allow_pickle=False) as file:    # a zip, with a checksum of each array
                names, ends, places = (file[name] for name in ("names", "ends", "places"))
            if (names.dtype, ends.dtype, places.dtype) == (np.uint8, np.int64, np.int64) and (
                    places.shape == (len(ends), 2) and ends[-1:].sum() == len(names)
                    and (np.diff(ends, prepend=0) >= 0).all() and self._lie_inside(places)):
                return names, ends, places
        except Exception:                                   # of the many kinds that numpy raises
            return None                                     # then it is made again
        return None


def name_of(info):
    """The name of a file in a zip. Info-ZIP on Linux writes UTF-8 and does not say so; zipfile then reads it
    as the letters that DOS had."""
    try:
        says_so = info.flag_bits & 0x800
        return info.filename if says_so else info.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.filename
