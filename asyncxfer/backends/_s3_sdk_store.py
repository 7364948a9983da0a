"""`SdkStore`: one bucket of S3 by aiobotocore's own client, for what takes more than signed requests to one endpoint.

Owns which calls an operation takes and what is right about their answers; requests, repetitions and redirects are the
SDK's, who asks is the account's. Proxies, access points, S3 Express and accelerated endpoints work as the SDK does it.

Every call is made as often as the SDK finds right. Two things it leaves to its caller, and they are done here: a body
that breaks is gone on with where it broke, and credentials that were refused are replaced. Checksums are computed here:
the SDK's own would need a library more.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import random
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, Self

from .._errors import ChecksumError, ObjectError, ObjectExistsError, ObjectMissingError, TransferError, TransferTimeout
from .._fast.crc64 import combine
from ..abc import Exists, ObjectInfo
from ._object._store import Part, Read
from ._object._sums import as_header, crc32c_of, crc64_of, from_header

if TYPE_CHECKING:
    from .._config import Config
    from ._s3_sdk import Account

__all__ = ["SdkStore"]

_CHECKSUMS = ("CRC64NVME", "CRC32C", "CRC32", "SHA256", "SHA1")
_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")
_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"})
_CONFLICT = frozenset({"ConditionalRequestConflict", "OperationAborted"})
_WEAK = frozenset({"InternalError", "SlowDown", "ServiceUnavailable"})
#: What an answer about one key would have had, where one about many says it.
_STATUS = {"AccessDenied": 403, "InternalError": 500, "ServiceUnavailable": 503, "SlowDown": 503}
_PIECE = 1 << 20  # bytes that are received, or compared, at once
_AT_ONCE = 1 << 20  # bytes; larger bodies are handed over in pieces
_PAGE = 1000  # keys a request, of those that are deleted
_COPIES = 8  # parts of a copy under way
_SHORTEST, _LONGEST = 0.05, 5.0  # seconds; between them lies the bound of a wait, doubled each time

_ADVICE = {
    "AccessDenied": "let these credentials do this, or use others",
    "EntityTooLarge": "write it in parts",
    "InvalidAccessKeyId": "check aws_access_key_id, and that it is one of this endpoint's",
    "NoSuchBucket": "create the bucket, or correct its name or the endpoint",
    "NoSuchUpload": "begin the upload anew: it was aborted, or completed",
    "RequestTimeTooSkewed": "set the clock of this host",
    "SignatureDoesNotMatch": "check aws_secret_access_key, and that nothing on the way changes requests",
}
_ADVICE_BY_STATUS = {
    0: "check endpoint_url, and the network between this host and the store",
    301: "name the bucket's region by the option region_name",
    307: "name the bucket's region by the option region_name",
    403: _ADVICE["AccessDenied"],
    404: "check the key",
    412: "ask what the object is now",
    416: "read what is there, or find who has written another length",
    503: "lower object_concurrency, or give it more time",
}
_SHORT = _ADVICE_BY_STATUS[416]
_DAMAGED = "something between this host and the store changes bytes: use https, and look at the network"


class SdkStore:
    """Implements `ObjectStore`. Made by `open`, on the loop that uses it.

    Parameters
    ----------
    account : Account
        Stays its caller's to close, later than this.
    client : object
        aiobotocore's, entered.
    closing : contextlib.AsyncExitStack
        What it takes to leave it.
    config : Config
        Its keys ``object_...``.

    Attributes
    ----------
    largest_copy, copied_part : int, bytes
        Copied by one request; copied as one part above that.
    """

    algorithm: ClassVar[str] = "crc64nvme"
    smallest_part: ClassVar[int] = 5 << 20
    most_parts: ClassVar[int] = 10_000
    largest_write: ClassVar[int] = 5 << 30
    largest_copy: ClassVar[int] = 5 << 30
    copied_part: ClassVar[int] = 512 << 20

    def __init__(self, account: Account, client: Any, closing: contextlib.AsyncExitStack, config: Config) -> None:
        self.url = account.url
        self._account = account
        self._client = client
        self._closing = closing
        self._most = config.object_attempts

    @classmethod
    async def open(cls, account: Account, config: Config) -> Self:
        """Make a client of the account's bucket; nothing is asked of it.

        Raises
        ------
        RegistrationError
            The SDK cannot make one as it is set up.
        """
        async with contextlib.AsyncExitStack() as closing:
            client = await closing.enter_async_context(
                await account.client(
                    connections=config.object_concurrency,
                    attempts=config.object_attempts,
                    patience=config.object_attempt_timeout,
                )
            )
            return cls(account, client, closing.pop_all(), config)
        raise AssertionError

    async def aclose(self) -> None:
        """Close all connections."""
        await self._closing.aclose()

    # -- bytes

    async def read(
        self,
        key: str,
        offset: int,
        into: Sequence[memoryview],
        *,
        whole: bool,
        verify: bool,
        etag: str | None,
        deadline: float,
        crc: bool = False,
    ) -> Read:
        """Read bytes from `offset` on."""
        views = [view if view.format == "B" and view.ndim == 1 else view.cast("B") for view in into]
        if not whole and not any(view.nbytes for view in views):
            info = await self.head(key, deadline=deadline)
            if info.nbytes < offset:
                raise self._refusal("get", key, f"the object has {info.nbytes} bytes, not {offset}", advice=_SHORT)
            return Read(info.etag, info.nbytes, 0)
        tries = 0
        while True:
            reading = _Reading(key, offset, views, whole, etag)
            await self._receive(reading, deadline)
            wrong = await self._disproved(reading, verify=verify, deadline=deadline)
            if not wrong:
                break
            tries += 1
            if tries == self._most:
                self._damaged(key, wrong)
        return Read(reading.etag, reading.length, await reading.crc64() if crc or reading.summed is not None else None)

    async def _receive(self, reading: _Reading, deadline: float) -> None:
        """Let all of it come, going on where it breaks."""
        tries = 0
        while True:
            before = reading.got
            try:
                answer = await self._call("get", reading.key, deadline, "get_object", **reading.parameters())
            except ObjectError as error:
                if error.code not in ("PreconditionFailed", "412") or reading.wanted is not None:
                    raise self._explained(reading, error) from error.__cause__
                broken: Exception | str = "the object was replaced while it was read"
                reading.restart()
            else:
                reached = await self._fill(reading, answer, deadline)
                if reached is None:
                    return
                broken = reached
            tries = 0 if reading.got > before else tries + 1
            if tries >= self._most:
                if _is_damage(broken):
                    self._damaged(reading.key, str(broken))
                raise self._refusal("get", reading.key, f"no attempt was right; the last: {broken}")
            if tries:
                await self._wait(tries, "get", reading.key, deadline)

    async def _fill(self, reading: _Reading, answer: dict[str, Any], deadline: float) -> Exception | None:
        """Receive a body; what broke it, where something did."""
        body = answer["Body"]
        try:
            misfit = reading.take(answer)
            if misfit and not reading.certain:
                reading.restart()
                return EOFError(misfit)
            if misfit:
                status = answer["ResponseMetadata"]["HTTPStatusCode"]
                request_id = _request_id(answer)
                raise self._refusal("get", reading.key, misfit, status=status, request_id=request_id, advice=_SHORT)
            async with self._until(deadline, "get", reading.key):
                try:
                    await reading.receive(body)
                except TransferError:
                    raise
                except Exception as error:
                    if not _is_broken(error):
                        raise
                    if not reading.resumable or _is_damage(error):
                        reading.restart()
                    return error
        finally:
            body.close()
        return None

    def _explained(self, reading: _Reading, error: ObjectError) -> ObjectError:
        """Say what a refusal means for what is read."""
        if error.status == 416:
            return self._refusal(
                "get", reading.key, f"the object has fewer bytes than {reading.offset + reading.size}",
                status=416, code=error.code, request_id=error.request_id, advice=_SHORT,
            )  # fmt: skip
        if error.status == 412:
            return self._refusal(
                "get", reading.key, f"the object is not the version {reading.wanted} any more",
                status=412, code=error.code, request_id=error.request_id,
            )  # fmt: skip
        return error

    async def _disproved(self, reading: _Reading, *, verify: bool, deadline: float) -> str:
        """Say what is wrong with the bytes that came; nothing, where they are proved or need no proof."""
        if reading.claim is not None:
            name, value = reading.claim
            found = await (reading.crc64() if name == "CRC64NVME" else crc32c_of(reading.views))
            return "" if found == value else f"their {name} is {found:#x}, and that of the object {value:#x}"
        if not verify or reading.proved or self._account.endpoint.startswith("https:"):
            return ""
        mine = await reading.crc64()
        scratch = memoryview(bytearray(min(_PIECE, max(1, reading.size))))
        again, at = 0, 0
        while at < reading.size:
            piece = scratch[: min(_PIECE, reading.size - at)]
            second = _Reading(reading.key, reading.offset + at, [piece], False, reading.etag or None)
            await self._receive(second, deadline)
            again = combine(again, await crc64_of([piece]), piece.nbytes)
            at += piece.nbytes
        return "" if again == mine else "two readings of it differ"

    async def write(self, key: str, body: Sequence[memoryview], *, exists: Exists, deadline: float) -> str:
        """Write an object; its etag, or nothing where one was there and was kept."""
        crc = await crc64_of(body)
        condition: dict[str, Any] = {} if exists == "replace" else {"IfNoneMatch": "*"}
        size = sum(view.nbytes for view in body)
        try:
            answer = await self._persist(
                "put", key, deadline, "put_object", body=body, ChecksumCRC64NVME=_text(crc), **condition
            )
        except ObjectError as error:
            if error.status == 412 and exists == "keep":
                return ""
            if error.status == 412 and exists == "error":
                return await self._ours(key, size, crc, error, deadline)
            raise
        self._compare("put", key, answer, crc)
        return str(answer.get("ETag", ""))

    async def _ours(self, key: str, size: int, crc: int, refused: ObjectError, deadline: float) -> str:
        """Give the etag of an object that is there, where an attempt whose answer was lost has written it."""
        if _repeated(refused):
            info = await self.head(key, deadline=deadline)
            if (info.nbytes, info.checksum) == (size, f"crc64nvme:{_text(crc)}"):
                return info.etag
        raise self._exists("put", key, refused) from refused.__cause__

    def _exists(self, op: str, key: str, refused: ObjectError) -> ObjectExistsError:
        message = _message(
            op, f"{self.url}/{key}", "there is an object of this key", refused.status, refused.code,
            refused.request_id, "take another key, or exists='replace'",
        )  # fmt: skip
        return ObjectExistsError(
            message, url=f"{self.url}/{key}", status=refused.status, code=refused.code,
            request_id=refused.request_id, backend="s3",
        )  # fmt: skip

    def _compare(self, op: str, key: str, answer: dict[str, Any], crc: int) -> None:
        """See that the store has what was sent."""
        told = from_header(str(answer.get("ChecksumCRC64NVME", "")).encode())
        if told is not None and told != crc:
            self._damaged(key, f"the store has other bytes: their CRC64NVME is {told:#x}, not {crc:#x}", op)

    # -- uploads in parts

    async def begin(self, key: str, *, deadline: float) -> str:
        """Begin a multipart upload; its id."""
        answer = await self._call(
            "put", key, deadline, "create_multipart_upload", Key=key,
            ChecksumAlgorithm="CRC64NVME", ChecksumType="FULL_OBJECT",
        )  # fmt: skip
        return str(answer["UploadId"])

    async def part(self, key: str, upload: str, number: int, body: Sequence[memoryview], *, deadline: float) -> Part:
        """Write one part."""
        crc = await crc64_of(body)
        answer = await self._persist(
            "put", key, deadline, "upload_part", body=body,
            UploadId=upload, PartNumber=number, ChecksumCRC64NVME=_text(crc),
        )  # fmt: skip
        self._compare("put", key, answer, crc)
        return Part(number, sum(view.nbytes for view in body), str(answer["ETag"]), crc)

    async def complete(self, key: str, upload: str, parts: Sequence[Part], *, exists: Exists, deadline: float) -> str:
        """Make an object of the parts; its etag, or nothing where one was there and was kept."""
        crc, size = 0, 0
        for part in parts:
            crc = combine(crc, part.crc, part.nbytes)
            size += part.nbytes
        rows = [{"PartNumber": part.number, "ETag": part.etag, "ChecksumCRC64NVME": _text(part.crc)} for part in parts]
        condition: dict[str, Any] = {} if exists == "replace" else {"IfNoneMatch": "*"}
        try:
            answer = await self._persist(
                "put", key, deadline, "complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": rows},
                ChecksumCRC64NVME=_text(crc), ChecksumType="FULL_OBJECT", **condition,
            )  # fmt: skip
        except ObjectError as error:
            if error.status == 412 and exists == "keep":
                await self.abort(key, upload, deadline=deadline)
                return ""
            if error.status == 412 and exists == "error":
                raise self._exists("put", key, error) from error.__cause__
            if error.code == "NoSuchUpload" and _repeated(error):
                return await self._completed(key, size, crc, len(parts), error, deadline)
            raise
        self._compare("put", key, answer, crc)
        return str(answer.get("ETag", ""))

    async def _completed(self, key: str, size: int, crc: int, parts: int, refused: ObjectError, deadline: float) -> str:
        """Give the etag of an object that an attempt has completed whose answer was lost."""
        with contextlib.suppress(ObjectMissingError):
            info = await self.head(key, deadline=deadline)
            in_parts = info.etag.strip('"').endswith(f"-{parts}")
            if in_parts and info.nbytes == size and info.checksum in (None, f"crc64nvme:{_text(crc)}"):
                return info.etag
        raise refused

    async def abort(self, key: str, upload: str, *, deadline: float) -> None:
        """Let nothing of an upload be left."""
        tries = 0
        while True:
            try:
                await self._call("abort", key, deadline, "abort_multipart_upload", Key=key, UploadId=upload)
                # A part that was under way may have come behind the abortion.
                await self._call("abort", key, deadline, "list_parts", Key=key, UploadId=upload)
                left = self._refusal("abort", key, "parts of it are still there", advice="abort it once more")
            except ObjectError as error:
                if error.status == 404 and error.code != "NoSuchBucket":
                    return
                left = error
            tries += 1
            if tries == self._most or left.status == 403:
                raise left
            await self._wait(tries, "abort", key, deadline)

    # -- objects

    async def head(self, key: str, *, deadline: float) -> ObjectInfo:
        """Ask what an object is."""
        answer = await self._call("head", key, deadline, "head_object", Key=key, ChecksumMode="ENABLED")
        checksum = None
        for name in _CHECKSUMS:
            value = answer.get(f"Checksum{name}")
            if value and "-" not in value:  # of the parts' checksums, where it ends in their number
                checksum = f"{name.lower()}:{value}"
                break
        return _info(key, answer["ContentLength"], answer, checksum)

    async def list(self, prefix: str, *, deadline: float, after: str = "") -> AsyncIterator[ObjectInfo]:
        """Give what is there, by keys in order."""
        more: dict[str, Any] = {"StartAfter": after} if after else {}
        while True:
            answer = await self._call("list", prefix, deadline, "list_objects_v2", Prefix=prefix, **more)
            for row in answer.get("Contents", ()):
                yield _info(row["Key"], row["Size"], row, None)
            token = answer.get("NextContinuationToken")
            if not answer.get("IsTruncated") or not token:
                return
            more = {"ContinuationToken": token}

    async def delete(self, keys: Sequence[str], *, deadline: float) -> None:
        """Delete objects; those that are not there are fine."""
        if len(keys) == 1:
            with contextlib.suppress(ObjectMissingError):
                await self._call("delete", keys[0], deadline, "delete_object", Key=keys[0])
            return
        for first in range(0, len(keys), _PAGE):
            await self._delete(keys[first : first + _PAGE], deadline)

    async def _delete(self, keys: Sequence[str], deadline: float) -> None:
        for tries in range(1, self._most + 1):
            rows = [{"Key": key} for key in keys]
            answer = await self._call(
                "delete", keys[0], deadline, "delete_objects", Delete={"Objects": rows, "Quiet": True}
            )
            failed = [row for row in answer.get("Errors", ()) if row.get("Code") != "NoSuchKey"]
            if not failed:
                return
            first = failed[0]
            if tries == self._most or any(row.get("Code") not in _WEAK for row in failed):
                code = str(first.get("Code", ""))
                raise self._refusal(
                    "delete", str(first.get("Key")), str(first.get("Message", "the store refused")).rstrip("."),
                    status=_STATUS.get(code, 200), code=code, request_id=_request_id(answer),
                )  # fmt: skip
            keys = [row["Key"] for row in failed]
            await self._wait(tries, "delete", keys[0], deadline)

    async def copy(self, source: str, target: str, *, deadline: float) -> None:
        """Copy an object within the bucket."""
        info = await self.head(source, deadline=deadline)
        place = {"Bucket": self._account.bucket, "Key": source}
        if info.nbytes <= self.largest_copy:
            await self._persist("copy", target, deadline, "copy_object", CopySource=place, CopySourceIfMatch=info.etag)
            return
        began = await self._call("copy", target, deadline, "create_multipart_upload", Key=target)
        upload = str(began["UploadId"])
        try:
            rows = await self._copied(place, target, upload, info, deadline)
            await self._persist(
                "copy", target, deadline, "complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": rows}
            )
        except BaseException:
            with contextlib.suppress(TransferError):  # what has failed is what its caller wants to know
                await self.abort(target, upload, deadline=asyncio.get_running_loop().time() + _LONGEST)
            raise

    async def _copied(
        self, place: dict[str, str], target: str, upload: str, info: ObjectInfo, deadline: float
    ) -> Sequence[dict[str, Any]]:
        size = max(self.copied_part, -(-info.nbytes // self.most_parts))
        turn = asyncio.Semaphore(_COPIES)

        async def one(number: int, start: int) -> dict[str, Any]:
            async with turn:
                answer = await self._call(
                    "copy", target, deadline, "upload_part_copy", Key=target, UploadId=upload, PartNumber=number,
                    CopySource=place, CopySourceIfMatch=info.etag,
                    CopySourceRange=f"bytes={start}-{min(start + size, info.nbytes) - 1}",
                )  # fmt: skip
            return {"PartNumber": number, "ETag": answer["CopyPartResult"]["ETag"]}

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(one(number, start)) for number, start in enumerate(range(0, info.nbytes, size), 1)
                ]
        except BaseExceptionGroup as error:
            raise error.exceptions[0] from None
        return [task.result() for task in tasks]

    # -- calls

    async def _persist(
        self, op: str, key: str, deadline: float, method: str, *, body: Sequence[memoryview] | None = None, **more: Any
    ) -> dict[str, Any]:
        """Make a call again that another one was in the way of."""
        for tries in range(1, self._most + 1):
            try:
                if body is None:
                    return await self._call(op, key, deadline, method, Key=key, **more)
                with _payload(body) as payload:
                    return await self._call(op, key, deadline, method, Key=key, Body=payload, **more)
            except ObjectError as error:
                if error.code not in _CONFLICT or tries == self._most:
                    raise
            await self._wait(tries, op, key, deadline)
        raise AssertionError

    async def _call(self, op: str, key: str, deadline: float, method: str, **parameters: Any) -> dict[str, Any]:
        """Call the client; with other credentials, once, where these were refused."""
        for again in (True, False):
            try:
                async with self._until(deadline, op, key):
                    answer: dict[str, Any] = await getattr(self._client, method)(
                        Bucket=self._account.bucket, **parameters
                    )
                    return answer
            except TransferError:
                raise
            except Exception as error:
                failure = self._failure(op, key, error)
                if failure is None:
                    raise
                if failure.code not in _EXPIRED or not again:
                    raise failure from error
                used = await self._account.credentials()
                if await self._account.credentials(refresh=True) is used:
                    raise failure from error
        raise AssertionError

    @contextlib.asynccontextmanager
    async def _until(self, deadline: float, op: str, key: str) -> AsyncIterator[None]:
        limit = asyncio.timeout_at(deadline)
        try:
            async with limit:
                yield
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise self._late(op, key) from error

    def _late(self, op: str, key: str) -> TransferTimeout:
        what = "not done in time, repetitions by the SDK included"
        return TransferTimeout(
            _message(op, f"{self.url}/{key}", what, 0, "", "", "give it more time, or look at the store"), backend="s3"
        )

    async def _wait(self, tries: int, op: str, key: str, deadline: float) -> None:
        """Wait a while before something is tried again."""
        seconds = random.uniform(0, min(_LONGEST, _SHORTEST * 2**tries))  # noqa: S311 - nobody has to guess it
        if asyncio.get_running_loop().time() + seconds >= deadline:
            raise self._late(op, key)
        await asyncio.sleep(seconds)

    # -- errors

    def _failure(self, op: str, key: str, error: Exception) -> ObjectError | None:
        """Make of an exception of the SDK what it means; None: it is none."""
        from botocore.exceptions import BotoCoreError, ClientError

        if isinstance(error, ClientError):
            told = error.response.get("Error", {})
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            code = str(told.get("Code", ""))
            what = str(told.get("Message") or "the store refused").strip().rstrip(".")
            return self._refusal(op, key, what, status=status, code=code, request_id=_request_id(error.response))
        if isinstance(error, BotoCoreError) or _is_broken(error):
            return self._refusal(op, key, f"{error} ({type(error).__name__})".replace("\n", " "))
        return None

    def _refusal(
        self, op: str, key: str, what: str, *, status: int = 0, code: str = "", request_id: str = "", advice: str = ""
    ) -> ObjectError:
        missing = status == 404 and code in ("NoSuchKey", "404", "NotFound")
        if missing:
            what = "there is no such object"
        if code in _EXPIRED:
            advice = "get new credentials: those that the account gives have ended"
        if not advice:
            advice = _ADVICE.get(code) or _ADVICE_BY_STATUS.get(status, "tell who runs the store the request id")
        message = _message(op, f"{self.url}/{key}", what, status, code, request_id, advice)
        kind = ObjectMissingError if missing else ObjectError
        return kind(message, url=f"{self.url}/{key}", status=status, code=code, request_id=request_id, backend="s3")

    def _damaged(self, key: str, what: str, op: str = "get") -> NoReturn:
        raise ChecksumError(_message(op, f"{self.url}/{key}", what, 0, "", "", _DAMAGED), backend="s3")


class _Claim(NamedTuple):
    """What the store says of the whole object."""

    name: str
    value: int


class _Reading:
    """Bytes of one object on their way, by one request or several."""

    def __init__(
        self,
        key: str,
        offset: int,
        views: Sequence[memoryview],
        whole: bool,
        wanted: str | None,
    ) -> None:
        self.key = key
        self.offset = offset
        self.views = views
        self.size = sum(view.nbytes for view in views)
        self.whole = whole
        self.wanted = wanted
        self.etag = ""
        self.length = -1
        self.certain = False
        self.got = 0
        self.claim: _Claim | None = None
        self.proved = False  # by the SDK
        self.summed: int | None = None

    def restart(self) -> None:
        """Begin anew; what came is overwritten."""
        self.got = 0
        self.etag = ""
        self.claim = None
        self.proved = False

    @property
    def resumable(self) -> bool:
        """Whether the rest is enough: not where the SDK is to sum all of it up."""
        return bool(self.etag) and not self.proved and self.got < self.size

    def parameters(self) -> dict[str, Any]:
        """Give what is asked for now."""
        asked: dict[str, Any] = {"Key": self.key}
        if self.whole and not self.got:
            asked["ChecksumMode"] = "ENABLED"
        else:
            asked["Range"] = f"bytes={self.offset + self.got}-{self.offset + self.size - 1}"
        if self.wanted or (self.got and self.etag):
            asked["IfMatch"] = self.etag if self.got else self.wanted
        return asked

    def take(self, answer: dict[str, Any]) -> str:
        """Look at what an answer says of its body; why it is not what was asked for, where it is not."""
        length, found = int(answer["ContentLength"]), _RANGE.fullmatch(answer.get("ContentRange") or "")
        self.certain = True
        if self.whole and not self.got:
            # Nothing but the length of the body says so, and that may have been changed on its way.
            self.certain, self.length = length == self.length, length
            if length != self.size:
                return f"the object has {length} bytes, and {self.size} were expected"
            self._claimed(answer)
        elif found is None:
            return "the store does not answer with a range"
        else:
            first, last, self.length = map(int, found.groups())
            stop = self.offset + self.size
            if self.length < stop:
                return f"the object has {self.length} bytes, and those from {self.offset} to {stop} were wanted"
            if (first, last + 1, length) != (self.offset + self.got, stop, stop - self.offset - self.got):
                self.certain = False
                return f"the store answers with another range: {found[0]}, and {length} bytes"
        self.etag = str(answer.get("ETag", ""))
        return ""

    def _claimed(self, answer: dict[str, Any]) -> None:
        self.claim, self.proved = None, False
        if answer.get("ChecksumType", "FULL_OBJECT") != "FULL_OBJECT":
            return
        for name in ("CRC64NVME", "CRC32C"):
            value = from_header(str(answer.get(f"Checksum{name}") or "").encode())
            if value is not None:
                self.claim = _Claim(name, value)
                return
        self.proved = any("-" not in (answer.get(f"Checksum{name}") or "-") for name in _CHECKSUMS[2:])

    async def receive(self, body: Any) -> None:
        """Let the body come into its place, to its very end, where the SDK looks at length and checksum."""
        at = 0
        for view in self.views:
            start = max(0, self.got - at)
            at += view.nbytes
            while start < view.nbytes:
                chunk = await body.read(min(view.nbytes - start, _PIECE))
                if not chunk:
                    raise EOFError(f"it ended {self.size - self.got} bytes early")
                view[start : start + len(chunk)] = chunk
                start += len(chunk)
                self.got += len(chunk)
        if await body.read(1):
            raise EOFError("it has more bytes than were told")

    async def crc64(self) -> int:
        """CRC64NVME of what has come."""
        if self.summed is None:
            self.summed = await crc64_of(self.views)
        return self.summed


class _Body(io.RawIOBase):
    """Memory in pieces, as a file that the SDK reads and rewinds."""

    def __init__(self, views: Iterable[memoryview]) -> None:
        self._views = [view if view.format == "B" and view.ndim == 1 else view.cast("B") for view in views]
        self._size = sum(view.nbytes for view in self._views)
        self._at = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go somewhere else."""
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        """Where it is."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill as much of `buffer` as one piece of memory can."""
        into = memoryview(buffer).cast("B")
        start = self._at
        for view in self._views:
            if start < view.nbytes:
                count = min(into.nbytes, view.nbytes - start)
                into[:count] = view[start : start + count]
                self._at += count
                return count
            start -= view.nbytes
        return 0


@contextlib.contextmanager
def _payload(body: Sequence[memoryview]) -> Any:
    """Give a body as the SDK takes it."""
    if len(body) == 1 and body[0].nbytes <= _AT_ONCE:
        yield body[0]
    else:
        with _Body(body) as file:
            yield file


def _info(key: str, nbytes: int, answer: dict[str, Any], checksum: str | None) -> ObjectInfo:
    return ObjectInfo(key, int(nbytes), str(answer.get("ETag", "")), answer["LastModified"].timestamp(), checksum)


def _text(crc: int) -> str:
    return as_header(crc).decode()


def _request_id(answer: dict[str, Any]) -> str:
    told = answer.get("ResponseMetadata", {})
    return str(told.get("RequestId") or told.get("HTTPHeaders", {}).get("x-amz-request-id", ""))


def _repeated(error: ObjectError) -> bool:
    """Whether the SDK had made the call before, and may not know what came of it."""
    response = getattr(error.__cause__, "response", {})
    return bool(response.get("ResponseMetadata", {}).get("RetryAttempts"))


def _message(op: str, url: str, what: str, status: int, code: str, request_id: str, advice: str) -> str:
    told = [f"status {status}" if status else "no answer", *([code] if code else [])]
    if request_id:
        told.append(f"request id {request_id}")
    return f"{op} of {url}: {what} ({', '.join(told)}); {advice}"


def _is_broken(error: Exception) -> bool:
    """Whether it says that a body did not come to its end, or not as it was sent."""
    from aiohttp import ClientError as HttpClientError
    from botocore.exceptions import BotoCoreError

    return isinstance(error, BotoCoreError | HttpClientError | OSError | EOFError)


def _is_damage(error: Exception | str) -> bool:
    from botocore.exceptions import FlexibleChecksumError

    return isinstance(error, FlexibleChecksumError)
