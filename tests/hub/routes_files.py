"""The byte side: downloads with ranges, and git-lfs uploads in one piece or in parts."""

from __future__ import annotations

import hashlib
import hmac
import math
import re
from typing import Any

from starlette.responses import JSONResponse, Response

from .app import Call, json_of, route
from .storage import HubError


@route("GET|HEAD", "/{id}/resolve/{rev}/{path}")
async def resolve(call: Call, id: str, rev: str, path: str) -> Response:  # noqa: A002
    repo = call.files_of(id)
    commit = repo.resolve(rev)
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    entry = commit.files.get(path)
    if entry is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers=headers)
    content = call.store.blobs[entry.sha256]
    headers["ETag"] = f'"{entry.etag}"'
    if entry.lfs:
        headers |= {"X-Linked-Etag": f'"{entry.etag}"', "X-Linked-Size": str(entry.size)}
    status, asked = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", call.request.headers.get("range", ""))
    if asked is not None and call.request.method == "GET":
        start, stop = int(asked[1]), int(asked[2] or entry.size - 1) + 1
        if start >= entry.size:
            raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{entry.size}"})
        content, status = content[start:stop], 206
        headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{entry.size}"
    if call.request.method == "HEAD":
        return Response(headers={**headers, "Content-Length": str(entry.size)})
    return Response(content, status, headers, media_type="application/octet-stream")


# ---- git-lfs ---------------------------------------------------------------------------------------------------------


def _sign(call: Call, oid: str) -> str:
    """Uploads carry no Authorization: the address itself is the permission."""
    return hmac.new(call.hub.secret.encode(), oid.encode(), "sha256").hexdigest()[:16]


def _signed(call: Call, oid: str) -> None:
    if call.request.query_params.get("sig") != _sign(call, oid):
        raise HubError(403, "SignatureDoesNotMatch")


@route("POST", "/{id}.git/info/lfs/objects/batch")
async def batch(call: Call, id: str) -> Response:  # noqa: A002
    repo, place = call.writable(id), "spaces/" if call.kind == "space" else ""
    objects, transfer = [], "basic"
    for wanted in (await json_of(call.request))["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        answer: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
        if oid not in call.store.blobs:
            upload, parts = _upload(call, oid, size)
            transfer = "multipart" if parts else transfer
            answer["actions"] = {
                "upload": upload,
                "verify": {"href": f"{call.base}/{place}{repo.id}.git/info/lfs/objects/verify"},
            }
        objects.append(answer)
    return JSONResponse({"transfer": transfer, "objects": objects})


def _upload(call: Call, oid: str, size: int) -> tuple[dict[str, Any], bool]:
    sig, step = _sign(call, oid), call.hub.part_size
    if step is None or size <= step:
        return {"href": f"{call.base}/lfs/{oid}?sig={sig}"}, False
    header = {str(n): f"{call.base}/lfs/{oid}/{n}?sig={sig}" for n in range(1, math.ceil(size / step) + 1)}
    return {"href": f"{call.base}/lfs/{oid}/complete?sig={sig}", "header": {"chunk_size": str(step), **header}}, True


def _stored(call: Call, oid: str, content: bytes) -> None:
    if hashlib.sha256(content).hexdigest() != oid:
        raise HubError(400, "The content does not have this sha256")
    call.store.put(content, lfs=True)


@route("PUT", "/lfs/{oid}")
async def put(call: Call, oid: str) -> Response:
    _signed(call, oid)
    _stored(call, oid, await call.request.body())
    return Response(status_code=200)


@route("PUT", "/lfs/{oid}/{n}")
async def put_part(call: Call, oid: str, n: str) -> Response:
    _signed(call, oid)
    content = await call.request.body()
    call.hub.uploads.setdefault(oid, {})[int(n)] = content
    return Response(headers={"ETag": f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'})


@route("POST", "/lfs/{oid}/complete")
async def complete(call: Call, oid: str) -> Response:
    _signed(call, oid)
    parts, body = call.hub.uploads.pop(oid, {}), await json_of(call.request)
    order = [part["partNumber"] for part in body["parts"]]
    if sorted(parts) != order or body["oid"] != oid:
        raise HubError(400, "The parts do not make up the object")
    _stored(call, oid, b"".join(parts[n] for n in order))
    return JSONResponse({})


@route("POST", "/{id}.git/info/lfs/objects/verify")
async def verify(call: Call, id: str) -> Response:  # noqa: A002
    call.writable(id)
    body = await json_of(call.request)
    if len(call.store.blobs.get(body["oid"], b"")) != body["size"]:
        raise HubError(400, "The object is not stored with this size")
    return JSONResponse({})
