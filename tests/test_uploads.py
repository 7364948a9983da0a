"""``region.objects.upload``: an object written part by part, against SeaweedFS and a backend that cannot."""

from __future__ import annotations

import random

import numpy as np
import pytest
from object_backend import MemBackend
from servers import REGION, S3Server, plain_request

from asyncxfer import AccessError, Agent, BackendError, ClosedError, DescriptorError

PART = 5 << 20


async def test_parts_in_any_order_make_one_object_and_what_is_left_leaves_nothing(s3: S3Server, bucket: str) -> None:
    data = random.Random(7).randbytes(2 * PART + 100)
    options = {
        "endpoint_url": s3.url, "addressing_style": "path", "region_name": REGION,
        "aws_access_key_id": s3.admin.access_key, "aws_secret_access_key": s3.admin.secret_key,
    }  # fmt: skip
    async with Agent("a", backends=["local", "s3"]) as agent, agent.allocate(len(data), "uint8") as memory:
        memory.array[:] = np.frombuffer(data, np.uint8)
        async with agent.open(f"s3://{bucket}/p", "w", options=options) as objects:
            async with objects.objects.upload("whole") as upload:
                await upload.put(2, memory[PART : 2 * PART])
                await upload.put(3, memory[2 * PART :])
                await upload.put(1, memory.descriptors([0, PART // 2], [PART // 2, PART // 2]))
                assert await upload.complete()
            with pytest.raises(ClosedError, match="has ended"):
                await upload.put(4, memory[:PART])
            async with objects.objects.upload("never") as upload:
                await upload.put(1, memory[:PART])
                with pytest.raises(DescriptorError, match="a number from 1"):
                    await upload.put(0, memory[:PART])
        async with agent.open(f"s3://{bucket}", options=options) as readonly:
            with pytest.raises(AccessError, match="mode 'r'"):
                readonly.objects.upload("other")
    where = f"{s3.url}/{bucket}"
    assert plain_request("GET", f"{where}/p/whole", identity=s3.admin).body == data
    assert plain_request("GET", f"{where}/p/never", identity=s3.admin).status == 404
    assert b"<UploadId>" not in plain_request("GET", f"{where}?uploads=", identity=s3.admin).body


async def test_a_backend_may_know_no_parts() -> None:
    async with Agent("a", backends=["local", MemBackend]) as agent, agent.open("mem://bucket", "w") as objects:
        with pytest.raises(BackendError, match="not part by part"):
            async with objects.objects.upload("key"):
                pytest.fail("it began")
