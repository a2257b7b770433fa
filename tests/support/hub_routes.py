"""The addresses of the tests' Hub, each with its few lines."""

from __future__ import annotations

import hashlib
import json
from urllib.parse import parse_qs

import yaml
from hub_server import CHUNK, Handler, blob_of
from hub_store import Blob, Refused

NAME = r"([\w.-]+/[\w.-]+)"
DATE = "2024-01-01T00:00:00.000Z"


def whoami(ask: Handler) -> None:
    user = ask.needs_user()
    token = {"role": user["role"], "displayName": "test"} | ({"fineGrained": user["fine"]} if "fine" in user else {})
    orgs = [{"name": name, "roleInOrg": "write"} for name in user.get("orgs", ())]
    ask.answer({"type": "user", "name": user["name"], "orgs": orgs, "auth": {"accessToken": token}})


def create(ask: Handler) -> None:
    body = json.loads(ask.body)
    user = ask.needs_user()
    name = f"{body.get('organization') or user['name']}/{body['name']}"
    private = bool(body.get("private", body.get("visibility") == "private"))
    ask.may_write(name)
    made = ask.hub.store.create(name, private, user["name"])
    address = {"url": f"{ask.hub.endpoint}/{name}"}
    ask.answer(address if made else address | {"error": "You already created this model repo"}, 200 if made else 409)


def validate(ask: Handler) -> None:
    content = json.loads(ask.body)["content"]
    block = content.split("---", 2)[1] if content.startswith("---") else ""
    try:
        value = yaml.safe_load(block) or {}
    except yaml.YAMLError:
        ask.answer({"errors": [{"message": "not YAML"}], "warnings": []}, 400)
        return
    errors = []
    if (
        not isinstance(value.get("license", ""), str)
        or value.get("license", "mit") != value.get("license", "mit").lower()
    ):
        errors.append({"message": '"license" must be one of a list of identifiers'})
    for model in value.get("model-index") or ():
        for result in model["results"]:
            errors += [
                {"message": "value must be a number"} for row in result["metrics"] if isinstance(row["value"], str)
            ]
    warnings = [] if value else [{"message": "empty or missing yaml metadata in repo card"}]
    ask.answer({"errors": errors, "warnings": warnings}, 400 if errors else 200)


def info(ask: Handler, name: str, revision: str = "main") -> None:
    repository = ask.repository(name)
    files = repository.files(revision)
    siblings = [{"rfilename": path, "size": blob.size, "blobId": blob.git_sha1} for path, blob in files.items()]
    value = {"id": name, "modelId": name, "private": repository.private, "sha": repository.resolve(revision)}
    ask.answer(value | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0})


def preupload(ask: Handler, name: str, revision: str) -> None:
    repository = ask.repository(name)
    if "create_pr" not in ask.query:
        ask.may_write(name, revision)
    files = repository.files(revision)
    rows = []
    for file in json.loads(ask.body)["files"]:
        path, there = file["path"], files.get(file["path"])
        lfs = path.endswith((".safetensors", ".wav", ".flac", ".bin")) or file["size"] > 10 << 20
        oid = (there.sha256 or there.git_sha1) if there else None
        rows.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
    ask.answer({"files": rows})


def batch(ask: Handler, name: str) -> None:
    ask.repository(name)
    ask.needs_user()
    rows = []
    for row in json.loads(ask.body)["objects"]:
        oid, size = row["oid"], row["size"]
        answer = {"oid": oid, "size": size}
        if oid not in ask.hub.store.objects:
            upload: dict = {"href": f"{ask.hub.storage}/storage/{oid}?signature=secret-of-the-storage"}
            if ask.hub.multipart and size > CHUNK:
                parts = {
                    str(n + 1): f"{ask.hub.storage}/storage/{oid}/{n}?signature=s" for n in range(-(-size // CHUNK))
                }
                upload = {"href": f"{ask.hub.endpoint}/complete/{oid}", "header": {"chunk_size": str(CHUNK), **parts}}
            verify = {"href": f"{ask.hub.endpoint}/{name}.git/info/lfs/verify"}
            answer["actions"] = {"upload": upload, "verify": verify}
        rows.append(answer)
    ask.answer({"transfer": "basic", "objects": rows})


def put(ask: Handler, oid: str, part: str = "") -> None:
    ask.hub.store.uploads[f"{oid}/{part}"] = ask.body
    ask.answer(b"", headers={"ETag": hashlib.md5(ask.body).hexdigest()})


def complete(ask: Handler, oid: str) -> None:
    uploads = ask.hub.store.uploads
    parts = json.loads(ask.body)["parts"]
    uploads[f"{oid}/"] = b"".join(uploads[f"{oid}/{row['partNumber'] - 1}"] for row in parts)
    ask.answer({})


def verify(ask: Handler, _name: str) -> None:
    ask.needs_user()
    body = json.loads(ask.body)
    objects = ask.hub.store.objects
    content = objects.get(body["oid"]) or ask.hub.store.uploads.pop(f"{body['oid']}/", b"")
    if hashlib.sha256(content).hexdigest() != body["oid"] or len(content) != body["size"]:
        raise Refused(400, "the stored object has another sha256")
    objects[body["oid"]] = content
    ask.answer({"success": True})


def commit(ask: Handler, name: str, revision: str) -> None:
    repository, user = ask.repository(name), ask.needs_user()
    create_pr = "create_pr" in ask.query
    if not create_pr:
        ask.may_write(name, revision)
    lines = [json.loads(line) for line in ask.body.splitlines()]
    header = lines[0]["value"]
    write, delete = {}, []
    for line in lines[1:]:
        key, value = line["key"], line["value"]
        if key == "deletedFile":
            delete.append(value["path"])
        else:
            write[value["path"]] = blob_of(ask.hub.store, key, value)
    sha, number = repository.commit(
        revision,
        header.get("parentCommit"),
        write,
        tuple(delete),
        header["summary"],
        header["description"],
        user["name"],
        create_pr,
    )
    url = f"{ask.hub.endpoint}/{name}/discussions/{number}" if number else None
    answer = {"success": True, "commitOid": sha, "commitUrl": f"{ask.hub.endpoint}/{name}/commit/{sha}"}
    ask.answer(answer | {"pullRequestUrl": url})


def tag(ask: Handler, name: str, revision: str) -> None:
    repository, body = ask.repository(name), json.loads(ask.body)
    ask.may_write(name)
    with repository.lock:
        if f"refs/tags/{body['tag']}" in repository.refs:
            raise Refused(409, "Tag reference exists already")
        repository.refs[f"refs/tags/{body['tag']}"] = repository.resolve(revision)
        repository.messages[body["tag"]] = body.get("message", "")
    ask.answer({})


def branch(ask: Handler, name: str, revision: str) -> None:
    repository = ask.repository(name)
    ask.may_write(name)
    with repository.lock:
        if f"refs/heads/{revision}" in repository.refs:
            raise Refused(409, "Branch exists already")
        start = json.loads(ask.body or b"{}").get("startingPoint") or "main"
        repository.refs[f"refs/heads/{revision}"] = repository.resolve(start)
    ask.answer({})


def refs(ask: Handler, name: str) -> None:
    rows: dict[str, list] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    kinds = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
    for ref, sha in ask.repository(name).refs.items():
        prefix = next(prefix for prefix in kinds if ref.startswith(prefix))
        rows[kinds[prefix]].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha})
    ask.answer(rows)


def commits(ask: Handler, name: str, revision: str) -> None:
    rows = ask.repository(name).history(revision)
    ask.page(
        [
            {
                "id": row.sha,
                "title": row.title,
                "message": row.description,
                "date": DATE,
                "authors": [{"user": row.author}],
            }
            for row in rows
        ]
    )


def tree(ask: Handler, name: str, revision: str, path: str = "") -> None:
    files = ask.repository(name).files(revision)
    ask.page([blob.row(key) for key, blob in sorted(files.items()) if key.startswith(path)])


def paths(ask: Handler, name: str, revision: str) -> None:
    files = ask.repository(name).files(revision)
    wanted = parse_qs(ask.body.decode())["paths"]
    ask.answer([files[path].row(path) for path in wanted if path in files])


def discussions(ask: Handler, name: str) -> None:
    repository = ask.repository(name)
    author, status = ask.query.get("author", [None])[0], ask.query.get("status", ["all"])[0]
    rows = [row for row in repository.pulls if author in (None, row.author) and status in ("all", row.status)]
    keys = {"repo": {"name": name, "type": "model"}, "isPullRequest": True, "createdAt": DATE}
    found = [
        keys | {"num": row.num, "title": row.title, "status": row.status, "author": {"name": row.author}}
        for row in rows
    ]
    ask.answer({"count": len(found), "start": 0, "discussions": found})


def resolve(ask: Handler, name: str, revision: str, path: str) -> None:
    repository = ask.repository(name)
    sha = repository.resolve(revision)
    blob: Blob | None = repository.files(sha).get(path)
    headers = {"X-Repo-Commit": sha}
    if blob is None:
        ask.answer({"error": "Entry not found"}, 404, {**headers, "X-Error-Code": "EntryNotFound"})
    elif blob.sha256:
        large = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        location = f"{ask.hub.storage}/storage/{blob.sha256}?signature=secret-of-the-storage"
        ask.answer(b"", 302, {**headers, **large, "ETag": f'"{blob.git_sha1}"', "Location": location})
    else:
        ask.bytes_with_range(blob.content or b"", {**headers, "ETag": f'"{blob.git_sha1}"'})


def stored(ask: Handler, oid: str) -> None:
    ask.bytes_with_range(ask.hub.store.objects[oid], {"ETag": f'"{oid}"', "Content-Type": "application/octet-stream"})


MODEL = f"/api/models/{NAME}"
ROUTES = (
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/repos/create", create),
    ("POST", "/api/validate-yaml", validate),
    ("GET", MODEL, info),
    ("GET", f"{MODEL}/revision/([^/]+)", info),
    ("POST", f"{MODEL}/preupload/([^/]+)", preupload),
    ("POST", f"/{NAME}\\.git/info/lfs/objects/batch", batch),
    ("PUT", r"/storage/(\w+)(?:/(\d+))?", put),
    ("GET", r"/storage/(\w+)", stored),
    ("POST", r"/complete/(\w+)", complete),
    ("POST", f"/{NAME}\\.git/info/lfs/verify", verify),
    ("POST", f"{MODEL}/commit/([^/]+)", commit),
    ("POST", f"{MODEL}/tag/([^/]+)", tag),
    ("POST", f"{MODEL}/branch/([^/]+)", branch),
    ("GET", f"{MODEL}/refs", refs),
    ("GET", f"{MODEL}/commits/([^/]+)", commits),
    ("GET", f"{MODEL}/tree/([^/]+)", tree),
    ("GET", f"{MODEL}/tree/([^/]+)/(.+)", tree),
    ("POST", f"{MODEL}/paths-info/([^/]+)", paths),
    ("GET", f"{MODEL}/discussions", discussions),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", resolve),
)
