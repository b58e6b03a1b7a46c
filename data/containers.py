"""What lies where in an audio file: its parts, each as a decoder must be given it to read it to its end.

A header's length is a hint. Recorders that were cut off, programs that wrote into a pipe, and files that were joined
leave 0, the largest number, or the length of the first part. Decoders that believe it stop before the file does. Here
the lengths follow from the bytes that are there: chunks (WAV, AIFF, AU, CAF, W64), frames (MP3) and pages (Ogg). That
of FLAC is set to unknown, with which its decoder reads to the end.
"""

import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple, Optional

BLOCK = 2**18  # bytes that a scan reads at once
PLACEHOLDER = 0x7FFFF000  # bytes: a chunk of this size or more has a writer that did not know its length
UNREAD = 2000  # bytes at the end of a file, above which they are more than padding or a tag
RESYNC = 2**20  # bytes without a frame, after which no more frames are looked for
SNIFFED = 2**16  # bytes in which the first frame of an MP3 file must lie
WORD = 2**32

# Containers that libsndfile does not read: (place, bytes, name).
FOREIGN = (
    (4, b"ftyp", "MP4 (m4a, mp4, mov, 3gp)"),
    (0, bytes.fromhex("3026b2758e66cf11"), "Windows Media (wma, asf)"),
    (0, bytes.fromhex("1a45dfa3"), "Matroska (webm, mkv)"),
    (0, b"#!AMR", "AMR"),
    (8, b"AVI ", "AVI"),
    (0, b"MAC ", "Monkey's Audio (ape)"),
    (0, b"wvpk", "WavPack"),
    (0, b"TTA1", "True Audio"),
    (0, b"MPCK", "Musepack"),
    (0, b"MP+", "Musepack"),
    (0, b"DSD ", "DSF"),
    (0, b"FRM8", "DSDIFF"),
    (0, b"FLV\1", "Flash video"),
    (0, b".RMF", "RealMedia"),
    (0, bytes.fromhex("0b77"), "AC-3"),
    (0, bytes.fromhex("000001ba"), "MPEG video"),
    (28, b"Speex   ", "Speex"),
)
ADTS = (b"\xff\xf0", b"\xff\xf1", b"\xff\xf8", b"\xff\xf9")
# Beginnings of files that libsndfile reads, beside those that PARTS has.
KNOWN = (b"dns.", b"Creative Voice File", b"NIST_1A", b"2BIT", b"PVF1", b" paf", b"fap ")


class Part(NamedTuple):
    """A sound in a file. head: bytes that stand in for the file's own before `begin`."""

    begin: int
    end: int
    head: bytes = b""
    samples: int = 0  # of a channel, that the frames hold at least; 0: not counted
    exact: bool = False  # the decoder computes the length from the bytes, not from a number in a header
    noisy: bool = False  # the decoder writes notes to standard error
    remark: str = ""  # what is wrong with the end of the part


class Bytes:
    """Bytes of a file by their place, read in blocks."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = file.seek(0, 2)
        self.block, self.first = b"", 0

    def at(self, place: int, count: int) -> bytes:
        """`count` bytes, fewer at the end of the file."""
        if place < 0:
            return b""
        if not self.first <= place <= self.first + len(self.block) - count:
            self._load(place, count)
        return self.block[place - self.first : place - self.first + count]

    def find(self, word: bytes, place: int, end: Optional[int] = None) -> int:
        """Where `word` begins, from `place` on and before `end`; -1: nowhere."""
        end = self.size if end is None else min(end, self.size)
        while place < end:
            if not self.first <= place <= self.first + len(self.block) - len(word):
                self._load(place, len(word))
            found = self.block.find(word, place - self.first)
            if found >= 0:
                return self.first + found if self.first + found < end else -1
            place = max(place, self.first + len(self.block) - len(word)) + 1
        return -1

    def _load(self, place: int, count: int) -> None:
        self.file.seek(place)
        self.block, self.first = self.file.read(max(count, BLOCK)), place


class View:
    """A part of a file as an open binary file, for libsndfile. reached: how far it was read."""

    def __init__(self, data: Bytes, part: Part) -> None:
        self.data, self.part = data, part
        self.size = len(part.head) + part.end - part.begin
        self.place, self.reached = 0, 0
        self.error: Optional[OSError] = None  # a callback of libsndfile must not raise

    def seek(self, offset: int, whence: int = 0) -> int:
        self.place = max(0, offset + (0, self.place, self.size)[whence])
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self.size - self.place))
        found = self.part.head[self.place : self.place + count]
        try:
            if count > len(found):
                inside = self.part.begin + self.place + len(found) - len(self.part.head)
                found += self.data.at(inside, count - len(found))
        except OSError as error:
            self.error = error
            return 0
        buffer[: len(found)] = found
        self.place += len(found)
        self.reached = max(self.reached, self.place)
        return len(found)


def find_parts(data: Bytes) -> list[Part]:
    """The sounds in a file, one behind the other; none in a container that libsndfile does not read."""
    found = _known_parts(data)
    return found or ([] if foreign_kind(data) else [Part(0, data.size, noisy=True)])


def _known_parts(data: Bytes) -> list[Part]:
    begin, end = _without_tags(data)
    for magic, find in PARTS.items():
        if data.at(begin, len(magic)) == magic:
            return find(data, begin, end)
    if any(data.at(begin, len(magic)) == magic for magic in KNOWN):
        return [Part(begin, data.size)]
    return [] if foreign_kind(data) else _mpeg_parts(data, begin, end)


def foreign_kind(data: Bytes) -> str:
    """The name of a container that libsndfile does not read; "" for others."""
    begin = _without_tags(data)[0]
    if data.at(begin, 2) in ADTS:
        return "AAC"
    return next((name for place, magic, name in FOREIGN if data.at(begin + place, len(magic)) == magic), "")


def looks_like_audio(file: BinaryIO) -> bool:
    """Whether the content of a file is of a kind that is read here, or through PyAV; its name does not count."""
    data = Bytes(file)
    return bool(foreign_kind(data) or _known_parts(data))


def _without_tags(data: Bytes) -> tuple[int, int]:
    """Where the sound begins and ends: without ID3 tags in front (version 2), and ID3 (1) and APE tags behind."""
    begin, end = 0, data.size
    while (size := _id3_size(data, begin)) and begin + size < end:
        begin += size
    if data.at(end - 128, 3) == b"TAG" and end - 128 > begin:
        end -= 128
    footer = data.at(max(begin, end - 32), 32)
    if footer[:8] == b"APETAGEX" and len(footer) == 32:
        size, flags = struct.unpack("<I4xI", footer[12:24])
        size += 32 if flags & 0x80000000 else 0
        end = end - size if begin < end - size else end
    return begin, end


def _id3_size(data: Bytes, place: int) -> int:
    """Bytes of the ID3v2 tag that begins there, 0 without one. Its size has 7 bits a byte."""
    head = data.at(place, 10)
    if head[:3] != b"ID3" or len(head) < 10 or max(head[6:]) > 127:
        return 0
    return 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]) + (10 if head[5] & 16 else 0)


# --- WAV and AIFF: chunks --------------------------------------------------------------------------------------------
FORMS = {b"RIFF": b"WAVE", b"RIFX": b"WAVE", b"RF64": b"WAVE", b"BW64": b"WAVE", b"FORM": b"AIF"}


def _chunked_parts(data: Bytes, begin: int, _: int) -> list[Part]:
    parts: list[Part] = []
    while _is_form(data, begin):
        found, following = _chunked_part(data, begin)
        parts.append(found)
        if not _is_form(data, following):
            rest = data.at(following, BLOCK)
            unread = data.size - following
            if unread > 8 and rest.strip(b"\0") and not (unread == 128 and rest.startswith(b"TAG")):
                parts[-1] = found._replace(remark=f"{unread} bytes after the end that its header states are not read")
            break
        begin = following
    return parts or ([] if foreign_kind(data) else [Part(begin, data.size)])


def _is_form(data: Bytes, place: int) -> bool:
    head = data.at(place, 12)
    return head[:4] in FORMS and head[8:].startswith(FORMS[head[:4]])


def _chunked_part(data: Bytes, begin: int) -> tuple[Part, int]:
    """The file of chunks that begins there, and where it ends."""
    magic = data.at(begin, 4)
    order, wanted = (">", b"SSND") if magic == b"FORM" else (">" if magic == b"RIFX" else "<", b"data")
    places: dict[bytes, int] = {}
    place, size = begin + 12, 0
    while place + 8 <= data.size:
        name, size = struct.unpack(f"{order}4sI", data.at(place, 8))
        places[name] = place
        if name == wanted:
            break
        place += 8 + size + size % 2
    else:
        return Part(begin, data.size, exact=True), data.size  # without sound: libsndfile has the reason
    start = place + 8
    if b"ds64" in places and size == WORD - 1:
        size = struct.unpack("<Q", data.at(places[b"ds64"] + 16, 8).ljust(8, b"\0"))[0]
    rest = data.size - start
    if 0 < size <= rest:
        size += (rest - size) // WORD * WORD  # a size that has run over, in a file of more than 4 GiB
    end = _end_of_chunks(data, start + size + size % 2, order) if size <= rest else data.size
    if size <= rest and not (size == 0 and rest and end == start):
        if size < WORD or b"ds64" in places:
            return Part(begin, end, exact=True), end
        return Part(start, end, _header(data, begin, start, places, order, size), exact=True), end
    cut = size > rest and size < PLACEHOLDER
    remark = f"its header states {size} bytes of sound, of which {rest} are there: it is cut off" if cut else ""
    head = _header(data, begin, start, places, order, rest)
    return Part(start, data.size, head, exact=True, remark=remark), data.size


def _end_of_chunks(data: Bytes, place: int, order: str) -> int:
    """The end of the whole chunks that begin at a place."""
    while place + 8 <= data.size:
        name, size = struct.unpack(f"{order}4sI", data.at(place, 8))
        if not (name.isascii() and name.decode("latin-1").isprintable()) or place + 8 + size > data.size:
            break
        if name in FORMS:  # another file begins
            break
        place += 8 + size + size % 2
    return min(place, data.size)


def _header(data: Bytes, begin: int, start: int, places: dict[bytes, int], order: str, size: int) -> bytes:
    """The bytes up to the sound with `size` for its length, as RF64 above 4 GiB."""
    head = bytearray(data.at(begin, start - begin))

    def put(place: int, value: int) -> None:
        head[place : place + 4] = struct.pack(f"{order}I", value)

    put(start - begin - 4, min(size, WORD - 1))
    put(4, min(len(head) - 8 + size, WORD - 1))
    if b"COMM" in places:
        place = places[b"COMM"] - begin + 8
        channels, _, bits = struct.unpack(">HIH", head[place : place + 8])
        put(place + 2, (size - 8) // max(1, channels * ((bits + 7) // 8)))
    elif b"ds64" in places:
        place = places[b"ds64"] - begin + 8
        head[place : place + 16] = struct.pack("<QQ", len(head) - 8 + size, size)
    elif size >= WORD:
        head[:12] = b"RF64\xff\xff\xff\xffWAVEds64" + struct.pack("<IQQQI", 28, len(head) + 28 + size, size, 0, 0)
    return bytes(head)


# --- AU, CAF, W64: one number of bytes before the sound --------------------------------------------------------------
def _au_parts(data: Bytes, begin: int, _: int) -> list[Part]:
    start, size = struct.unpack(">II", data.at(begin + 4, 8).ljust(8, b"\0"))
    return [_with_size(data, begin, begin + start, begin + 8, ">I", size, 0)]


def _caf_parts(data: Bytes, begin: int, _: int) -> list[Part]:
    place = begin + 8
    while place + 12 <= data.size:
        name, size = struct.unpack(">4sQ", data.at(place, 12))
        if name == b"data":
            return [_with_size(data, begin, place + 12, place + 4, ">Q", size, 0)]
        place += 12 + size
    return [Part(begin, data.size)]


def _w64_parts(data: Bytes, begin: int, _: int) -> list[Part]:
    place = begin + 40
    while place + 24 <= data.size:
        name, size = struct.unpack("<4s12xQ", data.at(place, 24))
        if name == b"data":
            return [_with_size(data, begin, place + 24, place + 16, "<Q", size - 24 if size else 0, 24)]
        place += max(24, size + -size % 8)
    return [Part(begin, data.size)]


def _with_size(data: Bytes, begin: int, start: int, place: int, form: str, size: int, counted: int) -> Part:
    """The file with the sound from `start` on, whose size stands at `place`. counted: bytes of the header in it."""
    rest = data.size - start
    if 0 < size <= rest or rest <= 0 or start - begin > BLOCK:
        return Part(begin, data.size)
    head = bytearray(data.at(begin, start - begin))
    length = struct.calcsize(form)
    head[place - begin : place - begin + length] = struct.pack(form, rest + counted)
    cut = size < PLACEHOLDER and size > rest
    remark = f"its header states {size} bytes of sound, of which {rest} are there: it is cut off" if cut else ""
    return Part(start, data.size, bytes(head), remark=remark)


# --- FLAC ------------------------------------------------------------------------------------------------------------
def _flac_parts(data: Bytes, begin: int, end: int) -> list[Part]:
    """Each stream with an unknown number of samples, with which the decoder goes to the end; joined ones one by one."""
    begins = [begin]
    for magic in (b"fLaC\0\0\0\x22", b"fLaC\x80\0\0\x22"):
        place = data.find(magic, begin + 4, end)
        while place >= 0:
            begins.append(place)
            place = data.find(magic, place + 4, end)
    begins.sort()
    parts = []
    for first, last in zip(begins, [*begins[1:], end], strict=True):
        head = bytearray(data.at(first, 26))
        if len(head) < 26:
            return [Part(begin, end)]
        samples = int.from_bytes(head[21:26], "big") & (2**36 - 1)
        head[21] &= 0xF0
        head[22:26] = bytes(4)
        parts.append(Part(first + 26, last, bytes(head), samples=samples))
    return parts


# --- Ogg -------------------------------------------------------------------------------------------------------------
def _ogg_parts(data: Bytes, begin: int, end: int) -> list[Part]:
    """Each link of a chain: libsndfile reads the first one only."""
    begins, place, before, ended, read_to = [begin], begin, True, False, begin
    while 0 <= place < end:
        head = data.at(place, 27)
        if len(head) < 27 or head[:4] != b"OggS":
            place = data.find(b"OggS", place + 1, end)
            continue
        first = bool(head[5] & 2)  # a page that begins a stream: several together begin a link
        if first and not before:
            begins.append(place)
        before, ended = first, bool(head[5] & 4)
        place += 27 + head[26] + sum(data.at(place + 27, head[26]))
        read_to = min(place, end)
    parts = [Part(first, last) for first, last in zip(begins, [*begins[1:], end], strict=True)]
    if end - read_to > UNREAD:
        parts[-1] = parts[-1]._replace(remark=f"{end - read_to} bytes behind its last page are not read")
    elif not ended or place > end:
        parts[-1] = parts[-1]._replace(remark="its last page does not end the stream: it is cut off")
    return parts


# --- MP3 -------------------------------------------------------------------------------------------------------------
_HIGH = (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448)
_MIDDLE = (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384)
_LOW = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_HALF = (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256)
_QUARTER = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
KBITS = {(3, 1): _HIGH, (3, 2): _MIDDLE, (3, 3): _LOW, (2, 1): _HALF, (2, 2): _QUARTER, (2, 3): _QUARTER}
INFO_BITRATE = 9  # number of the bit rate of a frame with room for the tag


class Frame(NamedTuple):
    """A frame of MPEG audio. form: what all frames of a stream share (version, layer, rate, mono)."""

    length: int  # bytes
    samples: int
    form: tuple[int, int, int, bool]
    tag: int  # place of the Xing or Info tag in the frame


@lru_cache(maxsize=4096)
def _frame(head: bytes) -> Optional[Frame]:
    """The frame with these four bytes in front; None: it is none."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer, checked = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3), not head[1] & 1
    kbits, rate, padding = head[2] >> 4, head[2] >> 2 & 3, head[2] >> 1 & 1
    if version == 1 or layer == 4 or kbits in (0, 15) or rate == 3 or head[3] & 3 == 2:
        return None
    hertz = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    bits = KBITS[version | 2, layer][kbits] * 1000
    mono = head[3] >> 6 == 3
    if layer == 1:
        return Frame((12 * bits // hertz + padding) * 4, 384, (version, layer, hertz, mono), 0)
    samples = 1152 if layer == 2 or version == 3 else 576
    side = ((17 if mono else 32) if version == 3 else (9 if mono else 17)) + (2 if checked else 0)
    return Frame(samples // 8 * bits // hertz + padding, samples, (version, layer, hertz, mono), 4 + side)


def _mpeg_parts(data: Bytes, begin: int, end: int) -> list[Part]:
    """Runs of frames of one form; a frame with a tag of a file's length, and what is no frame, begin another run."""
    parts, read_to = list[Part](), begin
    place = _next_frame(data, begin, begin + SNIFFED, end)
    while place >= 0:
        run = _Run(data, place)
        while (frame := _frame(data.at(place, 4))) is not None and place + frame.length <= end:
            if not run.takes(place, frame):
                break
            place += frame.length
        if run.frames or run.declared is not None:
            parts.append(run.part(place))
        read_to, place = place, _next_frame(data, place, place + RESYNC, end)
    if parts and end - read_to > UNREAD:
        parts[-1] = parts[-1]._replace(remark=f"{end - read_to} bytes behind its last frame are not read")
    return parts


def _next_frame(data: Bytes, place: int, until: int, end: int) -> int:
    """Where the next frames begin before `until`: three of one form, or fewer that end the sound; -1: nowhere."""
    while 0 <= place < min(until, end):
        at, forms = place, list[Any]()
        while len(forms) < 3 and (frame := _frame(data.at(at, 4))) is not None and at + frame.length <= end:
            forms.append(frame.form)
            at += frame.length
        if len(set(forms)) == 1 and (len(forms) == 3 or at >= end - 1):
            return place
        place = data.find(b"\xff", place + 1, min(until, end))
    return -1


class _Run:
    """Frames of one form, and the number of frames in the tag in front of them."""

    def __init__(self, data: Bytes, begin: int) -> None:
        self.data, self.begin, self.first = data, begin, begin
        self.frames, self.samples = 0, 0
        self.form: Any = None
        self.declared: Optional[int] = None

    def takes(self, place: int, frame: Frame) -> bool:
        """Whether the next frame belongs to the run."""
        if self.form not in (None, frame.form):
            return False
        tagged = self._tagged(place, frame)
        if tagged is not None:
            if self.form is not None:
                return False
            self.declared, self.first = tagged, place + frame.length
        else:
            self.frames += 1
            self.samples += frame.samples
        self.form = frame.form
        return True

    def _tagged(self, place: int, frame: Frame) -> Optional[int]:
        """The number of frames in a tag, 0 where it does not say; None: a frame of sound."""
        if frame.form[1] != 3:
            return None
        tag = self.data.at(place + frame.tag, 12)
        if tag[:4] in (b"Xing", b"Info"):
            return int.from_bytes(tag[8:12], "big") if tag[7:8] and tag[7] & 1 else 0
        return 0 if self.data.at(place + 36, 4) == b"VBRI" else None

    def part(self, end: int) -> Part:
        """With a tag of its own where there is none, or one with too low a number."""
        if self.form[1] != 3 or (self.declared is not None and self.declared >= self.frames):
            cut = self.declared is not None and self.declared > self.frames + 1
            remark = f"its header states {self.declared} frames, of which {self.frames} are there" if cut else ""
            return Part(self.begin, end, samples=self.samples, noisy=True, remark=remark)
        first = self.data.at(self.first, 4)
        head = bytes([255, first[1] | 1, INFO_BITRATE << 4 | first[2] & 12, first[3]])
        frame = _frame(head)
        assert frame is not None
        tag = b"Info" + struct.pack(">II", 1, self.frames)
        body = head + bytes(frame.tag - 4) + tag
        return Part(self.first, end, body.ljust(frame.length, b"\0"), samples=self.samples, noisy=True)


PARTS: dict[bytes, Callable[[Bytes, int, int], list[Part]]] = {
    **dict.fromkeys(FORMS, _chunked_parts),
    b".snd": _au_parts,
    b"caff": _caf_parts,
    b"riff\x2e\x91\xcf\x11": _w64_parts,
    b"fLaC": _flac_parts,
    b"OggS": _ogg_parts,
}
