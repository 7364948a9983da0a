"""Objects of S3 for the bench, as the SDK by itself finds, makes and reads them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Self

from ._object_store import KeptObjects, StoreAt
from ._pair import BenchError

__all__ = ["S3At"]


@dataclass(frozen=True, slots=True, kw_only=True)
class S3At(StoreAt):
    """A bucket, and the keys of who asks."""

    region: str
    access_key: str
    secret_key: str
    session_token: str | None = None

    @classmethod
    def of_null_server(cls, url: str, bucket: str, prefix: str, ca: str | None) -> Self:
        return cls(
            endpoint=url, bucket=bucket, prefix=prefix, ca=ca, region="us-east-1", access_key="null", secret_key="null"
        )

    @classmethod
    def found(cls, endpoint: str, bucket: str, prefix: str) -> Self:
        """With the credentials, region and authority that the SDK finds."""
        session: Any = importlib.import_module("botocore.session").get_session()
        credentials = session.get_credentials()
        if credentials is None:
            raise BenchError(f"nothing says who asks {endpoint}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        frozen = credentials.get_frozen_credentials()
        return cls(
            endpoint=endpoint,
            bucket=bucket,
            prefix=prefix,
            ca=session.get_config_variable("ca_bundle") if endpoint.startswith("https") else None,
            region=session.get_config_variable("region") or "us-east-1",
            access_key=frozen.access_key,
            secret_key=frozen.secret_key,
            session_token=frozen.token,
        )

    def objects(self) -> KeptObjects:
        return _S3Objects(self)


class _S3Objects(KeptObjects):
    def __init__(self, store: S3At) -> None:
        super().__init__(store)
        self._store = store
        self._client: Any = None
        failures = importlib.import_module("botocore.exceptions")
        self.failures = (failures.BotoCoreError, failures.ClientError)

    def _reach(self) -> None:
        store = self._store
        session: Any = importlib.import_module("botocore.session").get_session()
        self._client = session.create_client(
            "s3",
            endpoint_url=store.endpoint,
            region_name=store.region,
            aws_access_key_id=store.access_key,
            aws_secret_access_key=store.secret_key,
            aws_session_token=store.session_token,
            verify=store.ca,
            config=importlib.import_module("botocore.config").Config(s3={"addressing_style": "path"}),
        )
        try:
            self._client.head_bucket(Bucket=store.bucket)
        except self._client.exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
                raise
            self._client.create_bucket(Bucket=store.bucket)

    def _put(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=self._store.bucket, Key=key, Body=data)

    def _get(self, key: str) -> bytes:
        content: bytes = self._client.get_object(Bucket=self._store.bucket, Key=key)["Body"].read()
        return content

    def _delete(self, key: str) -> None:
        self._client.delete_object(Bucket=self._store.bucket, Key=key)

    def _close(self) -> None:
        self._client.close()
