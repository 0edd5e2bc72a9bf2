"""The JSON side: users, repos, search, refs, history, and what may be pushed."""

from __future__ import annotations

import base64
import json
from typing import Any
from urllib.parse import parse_qsl, urlencode

from starlette.responses import JSONResponse, Response

from . import cards
from .app import Call, json_of, route
from .storage import MAIN, Commit, Entry, HubError, Repo

# ---- users and repos -------------------------------------------------------------------------------------------------


@route("GET", "/api/whoami-v2")
async def whoami(call: Call) -> Response:
    user = call.user()
    orgs = [{"name": org, "fullname": org, "roleInOrg": user.role} for org in sorted(user.orgs)]
    token = {"displayName": "test", "role": user.role}
    auth = {"type": "access_token", "accessToken": token}
    return JSONResponse({"type": "user", "id": user.name, "name": user.name, "orgs": orgs, "auth": auth})


@route("POST", "/api/repos/create")
async def create(call: Call) -> Response:
    body = await json_of(call.request)
    kind = body.get("type") or "model"
    if kind not in ("model", "space"):
        raise HubError(400, f"This hub holds models and Spaces only, not {kind!r}")
    if kind == "space" and body.get("sdk") not in ("gradio", "docker", "static"):
        raise HubError(400, "A Space needs an SDK")
    namespace = body.get("organization") or call.user().name
    user, repo_id = call.writes(namespace), f"{namespace}/{body['name']}"
    url = f"{call.base}/{'spaces/' if kind == 'space' else ''}{repo_id}"
    try:
        call.store.create(repo_id, private=body.get("visibility") == "private", author=user.name, kind=kind)
    except HubError as error:
        error.body["url"] = url
        raise
    return JSONResponse({"url": url, "name": repo_id, "id": repo_id})


@route("DELETE", "/api/repos/delete")
async def delete(call: Call) -> Response:
    body = await json_of(call.request)
    namespace = body.get("organization") or call.user().name
    call.store.delete(call.writable(f"{namespace}/{body['name']}").id)
    return JSONResponse({})


@route("POST", "/api/repos/move")
async def move(call: Call) -> Response:
    body = await json_of(call.request)
    repo = call.writable(body["fromRepo"])
    call.writes(body["toRepo"].partition("/")[0])
    call.store.move(repo.id, body["toRepo"])
    return JSONResponse({})


@route("PUT", "/api/models/{id}/settings")
async def settings(call: Call, id: str) -> Response:  # noqa: A002
    repo, body = call.writable(id), await json_of(call.request)
    if "visibility" in body:
        repo.private = body["visibility"] == "private"
    if "gated" in body:
        repo.gated = body["gated"]
    return JSONResponse({"private": repo.private, "gated": repo.gated})


@route("POST", "/api/validate-yaml")
async def validate_yaml(call: Call) -> Response:
    errors, warnings = cards.problems((await json_of(call.request))["content"])
    body = {key: [{"message": text} for text in texts] for key, texts in (("errors", errors), ("warnings", warnings))}
    return JSONResponse(body, status_code=400 if errors else 200)


# ---- what there is ---------------------------------------------------------------------------------------------------


def card_of(call: Call, commit: Commit) -> dict[str, Any]:
    readme = commit.files.get("README.md")
    return {} if readme is None else cards.metadata(call.store.blobs[readme.sha256].decode("utf-8", "replace"))


def info_of(call: Call, repo: Repo, commit: Commit, *, blobs: bool = False) -> dict[str, Any]:
    card = card_of(call, commit)
    siblings: list[dict[str, Any]] = []
    for path, entry in sorted(commit.files.items()):
        sibling: dict[str, Any] = {"rfilename": path}
        if blobs:
            sibling |= {"size": entry.size, "blobId": entry.git_oid} | _lfs(entry)
        siblings.append(sibling)
    return {
        "_id": repo.id,
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.namespace,
        "sha": commit.oid,
        "lastModified": commit.date,
        "createdAt": repo.created,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "cardData": card,
        "siblings": siblings,
        **cards.describe(card, commit.files),
    }


def _lfs(entry: Entry) -> dict[str, Any]:
    if not entry.lfs:
        return {}
    return {"lfs": {"oid": entry.sha256, "sha256": entry.sha256, "size": entry.size, "pointerSize": 134}}


def _chosen(call: Call, info: dict[str, Any], always: tuple[str, ...] = ("_id", "id", "modelId")) -> dict[str, Any]:
    wanted = {value for key, value in call.request.query_params.multi_items() if key in ("expand", "expand[]")}
    return {key: value for key, value in info.items() if key in wanted or key in always} if wanted else info


@route("GET", "/api/models/{id}")
async def model_info(call: Call, id: str) -> Response:  # noqa: A002
    return await model_info_at(call, id, MAIN)


@route("GET", "/api/models/{id}/revision/{rev}")
async def model_info_at(call: Call, id: str, rev: str) -> Response:  # noqa: A002
    repo = call.repo(id)
    return JSONResponse(_chosen(call, info_of(call, repo, repo.resolve(rev), blobs=call.flag("blobs"))))


def page(call: Call, items: list[Any]) -> Response:
    """A page of a list, with the address of the next as the Hub's Link header gives it."""
    query = call.request.query_params
    start = int(query.get("cursor", "0"))
    size = min(int(query.get("limit", call.hub.page_size)), call.hub.page_size)
    headers = {}
    if start + size < len(items):
        rest = [(key, value) for key, value in query.multi_items() if key != "cursor"]
        following = urlencode([*rest, ("cursor", str(start + size))])
        headers["Link"] = f'<{call.base}{call.request.scope["raw_path"].decode()}?{following}>; rel="next"'
    return JSONResponse(items[start : start + size], headers=headers)


@route("GET", "/api/models")
async def search(call: Call) -> Response:
    query = call.request.query_params
    wanted, found = set(query.getlist("filter")), []
    for repo in list(call.store.repos.values()):
        if repo.kind != "model" or not repo.visible_to(call.viewer):
            continue
        info = info_of(call, repo, repo.resolve(MAIN))
        if not wanted <= {*info["tags"], info["library_name"], info["pipeline_tag"]}:
            continue
        if query.get("author", repo.namespace) != repo.namespace or query.get("search", "").lower() not in id_of(repo):
            continue
        if query.get("pipeline_tag", info["pipeline_tag"]) != info["pipeline_tag"]:
            continue
        found.append(info)
    sort = query.get("sort")
    found.sort(key=lambda info: info.get(sort or "lastModified") or 0, reverse=True)
    if not call.flag("full") and "expand" not in query:
        hidden = {"siblings", "sha", "lastModified"} | (set() if call.flag("cardData") else {"cardData"})
        found = [{key: value for key, value in info.items() if key not in hidden} for info in found]
    return page(call, [_chosen(call, info) for info in found])


def id_of(repo: Repo) -> str:
    return repo.id.lower()


@route("GET", "/api/models/{id}/tree/{rev}")
async def tree_root(call: Call, id: str, rev: str) -> Response:  # noqa: A002
    return await tree(call, id, rev, "")


@route("GET", "/api/models/{id}/tree/{rev}/{path}")
async def tree(call: Call, id: str, rev: str, path: str) -> Response:  # noqa: A002
    repo = call.repo(id)
    commit, prefix = repo.resolve(rev), f"{path}/" if path else ""
    files = {name: entry for name, entry in commit.files.items() if name.startswith(prefix)}
    if path and not files:
        say = f"{path} does not exist on {rev!r}"
        raise HubError(404, say, "EntryNotFound", headers={"X-Repo-Commit": commit.oid})
    found: dict[str, dict[str, Any]] = {}
    for name, entry in files.items():
        inside = name[len(prefix) :].split("/")
        for depth in range(1, len(inside)):
            folder = prefix + "/".join(inside[:depth])
            found.setdefault(folder, {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0})
        found[name] = _file(name, entry)
    if not call.flag("recursive"):
        found = {name: item for name, item in found.items() if "/" not in name[len(prefix) :]}
    items = [found[name] for name in sorted(found)]
    if call.flag("expand"):
        items = [{**item, "lastCommit": _last(repo, commit, item["path"])} for item in items]
    return page(call, items)


def _file(name: str, entry: Entry) -> dict[str, Any]:
    return {"type": "file", "path": name, "oid": entry.git_oid, "size": entry.size, **_lfs(entry)}


def _last(repo: Repo, commit: Commit, path: str) -> dict[str, Any]:
    """The commit that last changed a file, or anything in a folder."""

    def there(at: Commit) -> dict[str, Entry]:
        return {name: entry for name, entry in at.files.items() if f"{name}/".startswith(f"{path}/")}

    last = commit
    for older in repo.history(commit.oid)[1:]:
        if there(older) != there(commit):
            break
        last = older
    return {"id": last.oid, "title": last.title, "date": last.date}


@route("POST", "/api/models/{id}/paths-info/{rev}")
async def paths_info(call: Call, id: str, rev: str) -> Response:  # noqa: A002
    files = call.repo(id).resolve(rev).files
    form = parse_qsl((await call.request.body()).decode())
    paths = [value for key, value in form if key == "paths"]
    return JSONResponse([_file(path, files[path]) for path in paths if path in files])


# ---- refs and history ------------------------------------------------------------------------------------------------


@route("GET", "/api/models/{id}/refs")
async def refs(call: Call, id: str) -> Response:  # noqa: A002
    repo = call.repo(id)

    def listed(kind: str, names: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in names.items()]

    body = {"branches": listed("heads", repo.branches), "tags": listed("tags", repo.tags)}
    return JSONResponse({**body, "converts": [], "pullRequests": []})


@route("POST", "/api/models/{id}/branch/{rev}")
async def create_branch(call: Call, id: str, rev: str) -> Response:  # noqa: A002
    repo, body = call.writable(id), await json_of(call.request)
    if rev in repo.branches:
        raise HubError(409, f'Reference "refs/heads/{rev}" already exists')
    repo.branches[rev] = repo.resolve(body.get("startingPoint") or MAIN).oid
    return JSONResponse({})


@route("DELETE", "/api/models/{id}/branch/{rev}")
async def delete_branch(call: Call, id: str, rev: str) -> Response:  # noqa: A002
    repo = call.writable(id)
    if rev == MAIN:
        raise HubError(403, "Cannot delete refs/heads/main")
    if repo.branches.pop(rev, None) is None:
        raise HubError(404, f"Branch {rev} does not exist", "RevisionNotFound")
    return JSONResponse({})


@route("POST", "/api/models/{id}/tag/{rev}")
async def create_tag(call: Call, id: str, rev: str) -> Response:  # noqa: A002
    repo, body = call.writable(id), await json_of(call.request)
    if body["tag"] in repo.tags:
        raise HubError(409, f'Reference "refs/tags/{body["tag"]}" already exists')
    repo.tags[body["tag"]] = repo.resolve(rev).oid
    return JSONResponse({})


@route("DELETE", "/api/models/{id}/tag/{rev}")
async def delete_tag(call: Call, id: str, rev: str) -> Response:  # noqa: A002
    if call.writable(id).tags.pop(rev, None) is None:
        raise HubError(404, f"Tag {rev} does not exist", "RevisionNotFound")
    return JSONResponse({})


@route("GET", "/api/models/{id}/commits/{rev}")
async def commits(call: Call, id: str, rev: str) -> Response:  # noqa: A002
    history = call.repo(id).history(rev)
    return page(
        call,
        [
            {"id": c.oid, "title": c.title, "message": c.message, "authors": [{"user": c.author}], "date": c.date}
            for c in history
        ],
    )


# ---- pushing ---------------------------------------------------------------------------------------------------------


def _pushed(call: Call, repo_id: str, branch: str) -> tuple[Repo, Commit]:
    """The repo and the branch's head, if this user may push there."""
    repo = call.writable(repo_id)
    if call.flag("create_pr"):
        raise HubError(403, "Discussions are disabled for this repo")
    if branch not in repo.branches:
        raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    return repo, repo.commits[repo.branches[branch]]


@route("POST", "/api/models/{id}/preupload/{rev}")
async def preupload(call: Call, id: str, rev: str) -> Response:  # noqa: A002
    _, head = _pushed(call, id, rev)
    files = []
    for file in (await json_of(call.request))["files"]:
        path, lfs = file["path"], call.store.is_lfs(file["path"], file["size"])
        answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        if path in head.files:
            answer["oid"] = head.files[path].etag
        files.append(answer)
    return JSONResponse({"files": files, "commitOid": head.oid})


@route("POST", "/api/models/{id}/commit/{rev}")
async def commit(call: Call, id: str, rev: str) -> Response:  # noqa: A002
    repo, _ = _pushed(call, id, rev)
    lines = [json.loads(line) for line in (await call.request.body()).splitlines() if line.strip()]
    header: dict[str, Any] = {}
    put: dict[str, Entry] = {}
    deleted: dict[str, list[str]] = {"deletedFile": [], "deletedFolder": []}
    for line in lines:
        key, value = line["key"], line["value"]
        if key == "header":
            header = value
        elif key == "file":
            put[value["path"]] = call.store.put(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in call.store.blobs:
                raise HubError(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
            put[value["path"]] = call.store.entry(value["oid"], lfs=True)
        elif key in deleted:
            deleted[key].append(value["path"])
        else:
            raise HubError(400, f"This hub knows no commit operation {key!r}")
    if any(part in ("", ".", "..", ".git") for path in put for part in path.split("/")):
        raise HubError(400, "A path of the commit is not allowed")
    made = call.store.commit(
        repo,
        rev,
        put=put,
        delete=deleted["deletedFile"],
        delete_folders=deleted["deletedFolder"],
        title=header.get("summary", ""),
        body=header.get("description", ""),
        author=call.user().name,
        parent=header.get("parentCommit"),
    )
    url = f"{call.base}/{repo.id}/commit/{made.oid}"
    return JSONResponse({"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})
