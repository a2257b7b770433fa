"""Publishing when the Hub, the network or another publisher is in the way: nothing lost, nothing twice, no hang."""

from __future__ import annotations

import json
import signal
import threading
import traceback

import pytest
from hub_fixtures import NAME, READ, SECRETS, TOKEN, codes, evaluate, make_model, prove, settled
from hub_server import wait_for

COMMIT = "/commit/"


# kind, and what the publisher does after it: the commit is there either way, so that a second one would be seen
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("drop", {}),
        ("apply-drop", {}),
        ("apply-status", {"status": 504}),
        ("status", {"status": 500}),
        ("status", {"status": 503}),
        ("status", {"status": 409, "message": "another operation is in progress"}),
        ("status", {"status": 412, "message": "A commit has happened since. Please refresh and try again."}),
        ("status", {"status": 429, "headers": {"Retry-After": "1"}}),
    ],
)
def test_a_commit_whose_answer_is_lost_or_bad(hub, publisher, model, loader, kind, options):
    fault = hub.fault("POST", COMMIT, kind, **options)
    answer = publisher.run(model, NAME)
    assert fault.seen.is_set() and answer["committed"]
    assert answer["revision"] == hub.store.repositories[NAME].resolve("main")
    settled(hub, loader, model)


def test_a_commit_that_never_answers(hub, publisher, model, loader):
    hub.fault("POST", COMMIT, "hang")
    publisher.run(model, NAME, "--timeout", "1.5")
    assert hub.count("POST", COMMIT) == 2  # the one that is never answered, and one more
    settled(hub, loader, model)


def test_without_a_time_limit_it_would_hang(hub, model):
    """The control of the one above: the client's own settings wait for ever."""
    from convert.publishing.hub import client, hub_utils

    made = hub_utils()._http.default_client_factory()
    assert made.timeout.read is None
    with client(1.5, progress=False):
        assert hub_utils().get_session().timeout.read == 1.5
    assert hub_utils().get_session().timeout.read is None


@pytest.mark.parametrize(
    ("path", "kind", "options"),
    [
        ("/storage/", "status", {"status": 500}),
        ("/storage/", "drop", {}),
        ("/storage/", "truncate", {}),
        ("/preupload/", "status", {"status": 503}),
        ("/objects/batch", "drop", {}),
        ("/complete/", "apply-drop", {}),
        ("/api/repos/create", "apply-drop", {}),
        (
            "/api/repos/create",
            "status",
            {"status": 409, "message": "Cannot create repo: another conflicting operation is in progress"},
        ),
        ("/tag/", "apply-drop", {}),
        ("/tag/", "status", {"status": 500}),
    ],
)
def test_an_upload_or_a_request_that_fails_once(hub, publisher, model, loader, path, kind, options):
    method = "PUT" if path == "/storage/" else "POST"
    fault = hub.fault(method, path, kind, **options)
    answer = publisher.run(model, NAME)
    assert fault.seen.is_set()
    assert hub.store.repositories[NAME].refs[f"refs/tags/{answer['tag']}"] == answer["revision"]
    settled(hub, loader, model)


@pytest.mark.parametrize("path", ["/api/whoami-v2", "/api/models/alice/tiny$", "/tree/", "/refs$"])
def test_a_question_without_an_answer_is_asked_again(hub, publisher, model, loader, path):
    first = hub.fault("GET", path, "status", status=502)
    second = hub.fault("GET", path, "drop")
    publisher.run(model, NAME)
    assert first.seen.is_set() and second.seen.is_set()
    settled(hub, loader, model)


def test_corrupted_bytes_are_refused_and_sent_again(hub, publisher, model, loader):
    hub.multipart = False
    hub.fault("PUT", "/storage/", "corrupt")
    answer = publisher.run(model, NAME, status=2)
    assert codes(answer) == {("refused", NAME)}
    assert "upload model.safetensors" in answer["problems"][0]["detail"]
    assert len(hub.store.repositories[NAME].history("main")) == 1
    publisher.run(model, NAME)
    hub.multipart = True
    settled(hub, loader, model)


@pytest.mark.parametrize("change", [False, True])
def test_a_file_that_changes_while_it_is_sent(hub, publisher, model, loader, change):
    """A Hub may believe the hash it is told, so that the publisher looks; a file that is only touched is no reason."""
    path = model / "model.safetensors"

    def touch() -> None:
        content = bytearray(path.read_bytes())
        content[-1] ^= int(change)
        path.write_bytes(content)

    hub.fault("POST", "/lfs/verify", before=touch)
    answer = publisher.run(model, NAME, status=int(change))
    if change:
        assert codes(answer) == {("changed", "model.safetensors")} and hub.count("POST", COMMIT) == 0
    else:
        settled(hub, loader, model)


def test_a_hub_that_stores_other_bytes_is_found_out(hub, publisher, model):
    def other_bytes():
        from hub_store import Blob

        repository = hub.store.repositories[NAME]
        repository.commits[repository.resolve("main")].files["vocab.json"] = Blob(b"{}", None, 2)

    hub.fault("GET", "/tree/", times=1)  # the one before the commit
    hub.fault("GET", "/tree/", before=other_bytes)
    answer = publisher.run(model, NAME, status=1)
    assert codes(answer) == {("other-bytes", "vocab.json")}


# ---------------------------------------------------------------- no, with one sentence and the next step


@pytest.mark.parametrize(
    ("options", "more", "expected", "hint"),
    [
        ({"token": None}, {}, ("no-token", NAME), "hf auth login"),
        ({"token": "hf_" + "nobody" * 7}, {}, ("token", NAME), "HF_TOKEN"),
        ({"token": READ}, {}, ("read-token", ""), "write permission"),
        ({}, {"HF_HUB_OFFLINE": "1"}, ("offline", NAME), "unset HF_HUB_OFFLINE"),
        ({}, {"HF_ENDPOINT": "http://127.0.0.1:9"}, ("network", NAME), "check the connection"),
    ],
)
def test_who_cannot_publish_learns_why(hub, publisher, model, options, more, expected, hint):
    answer = publisher.run(model, NAME, status=2, **options, **more)
    assert codes(answer) == {expected} and hint in answer["hint"]
    assert hub.store.repositories == {}
    assert not (model / "README.md").exists()


def test_a_fine_grained_token_without_write_permission(hub, publisher, model):
    scope = {"entity": {"type": "user", "name": "alice"}, "permissions": ["repo.content.read"]}
    token = "hf_" + "FineGrained" * 4
    hub.store.users[token] = {"name": "alice", "role": "fineGrained", "fine": {"scoped": [scope]}}
    assert codes(publisher.run(model, NAME, token=token, status=2)) == {("read-token", "")}
    scope["permissions"].append("repo.write")
    publisher.run(model, NAME, token=token)


def test_a_quota_that_is_used_up_for_long(hub, publisher, model):
    hub.fault("POST", COMMIT, "status", status=429, headers={"Retry-After": "3600"}, times=9)
    answer = publisher.run(model, NAME, status=2)
    assert codes(answer) == {("quota", NAME)} and answer["hint"] == "run it again in 3600 seconds"


def test_a_hub_that_stays_broken(hub, publisher, model):
    hub.fault("GET", "/api/whoami-v2", "status", status=500, times=99)
    answer = publisher.run(model, NAME, status=2)
    assert codes(answer) == {("server", NAME)}
    hub.faults.clear()
    hub.fault("POST", "/api/repos/create", "status", status=403, message="quota of private storage is used up", times=9)
    answer = publisher.run(model, NAME, status=2)
    assert answer["problems"][0]["detail"] == (
        "could not create alice/tiny: the token may not do that: quota of private storage is used up"
    )


def test_a_hub_that_is_busy_for_ever(model, hub, publisher):
    """The client repeats this request without a pause and without an end."""
    busy = "Cannot create repo: another conflicting operation is in progress"
    hub.fault("POST", "/api/repos/create", "status", status=409, message=busy, times=10**6)
    assert codes(publisher.run(model, NAME, status=2)) == {("busy", "")}
    assert hub.count("POST", "/api/repos/create") == 7


def test_a_hub_without_xet(hub, publisher, model, loader):
    """Since huggingface_hub 1.20 an upload with hf_xet fails on such a Hub; ours goes on with LFS."""
    pytest.importorskip("hf_xet")
    publisher.run(model, NAME, HF_HUB_DISABLE_XET="0")
    assert hub.count("GET", "/xet-write-token/") >= 1
    settled(hub, loader, model)


# ---------------------------------------------------------------- others


def test_somebody_edits_the_card_meanwhile(hub, publisher, model, loader):
    publisher.run(model, NAME)
    repository = hub.store.repositories[NAME]
    evaluate(model)
    (model / "README.md").unlink()  # as in CI: the directory was made anew

    def edit():
        card = repository.files("main")["README.md"].content
        repository.edit("README.md", card + b"\n## Thanks\n\nTo everybody.\n")

    hub.fault("POST", COMMIT, before=edit)
    publisher.run(model, NAME)
    card = repository.files("main")["README.md"].content
    assert card.endswith(b"\n## Thanks\n\nTo everybody.\n") and b"value: 3.45" in card
    settled(hub, loader, model, commits=4)


def test_somebody_publishes_another_model_meanwhile(hub, publisher, model, tmp_path):
    hub.store.create(NAME, True, "alice")
    repository = hub.store.repositories[NAME]
    theirs = []
    hub.fault("POST", COMMIT, before=lambda: theirs.append(repository.edit("config.json", b"{}")))
    answer = publisher.run(model, NAME, status=1)
    assert codes(answer) == {("conflict", "config.json")}
    assert repository.resolve("main") == theirs[0]
    assert hub.count("POST", COMMIT) == 1


def test_somebody_commits_something_unrelated_meanwhile(hub, publisher, model, loader):
    hub.store.create(NAME, True, "alice")
    repository = hub.store.repositories[NAME]
    hub.fault("POST", COMMIT, before=lambda: repository.edit("notes.txt", b"mine"))
    publisher.run(model, NAME)
    assert [commit.title for commit in repository.history("main")][1] == "Update notes.txt"
    assert loader.logits(NAME) == loader.logits(model)


def test_a_commit_of_ours_with_a_foreign_one_on_top(hub, publisher, model, loader):
    """The answer is lost and the head is not ours any more: ours is found below it, and not sent again."""
    fault = hub.fault("POST", COMMIT, "apply-drop")
    hub.fault("GET", "/revision/main", before=lambda: None)
    hub.fault(
        "GET",
        "/revision/main",
        before=lambda: fault.seen.wait(20) and hub.store.repositories[NAME].edit("notes.txt", b"mine"),
    )
    answer = publisher.run(model, NAME)
    history = hub.store.repositories[NAME].history("main")
    assert [commit.title for commit in history][:2] == ["Update notes.txt", "Model converted from fairseq: tiny"]
    assert answer["revision"] == history[1].sha and len(history) == 3


@pytest.mark.parametrize("same", [True, False])
def test_eight_publishers_at_once_of_which_one_wins(hub, publisher, model, loader, tmp_path, same):
    directories = [model] * 8
    if not same:
        directories = [tmp_path / f"model-{number}" for number in range(8)]
        for number, directory in enumerate(directories):
            make_model(directory, seed=number)
            prove(directory)
    together = threading.Barrier(8)  # each has made its plan before the first may commit
    hub.fault("POST", COMMIT, before=lambda: together.wait(60), times=8)
    started = [publisher.start(directory, NAME, "--json") for directory in directories]
    said = [json.loads(publisher.finish(process, None)[0]) for process in started]
    assert sum(answer.get("committed", False) for answer in said) == 1
    statuses = [process.returncode for process in started]
    repository = hub.store.repositories[NAME]
    assert len(repository.history("main")) == 2
    if same:
        assert statuses == [0] * 8
        settled(hub, loader, model)
    else:
        assert sorted(statuses) == [0] + [1] * 7
        settled(hub, loader, directories[statuses.index(0)])


@pytest.mark.parametrize("place", ["upload", "commit"])
def test_killed_and_started_again(hub, publisher, model, loader, place):
    method, path = ("PUT", r"/storage/\w+/1") if place == "upload" else ("POST", COMMIT)
    fault = hub.fault(method, path, "hang")
    process = publisher.start(model, NAME)
    assert fault.seen.wait(600)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    repository = hub.store.repositories[NAME]
    assert len(repository.history("main")) == 1 and not (model / "README.md").exists()
    hub.seen.clear()
    publisher.run(model, NAME)
    assert hub.count("PUT", "/storage/") == (2 if place == "upload" else 0)  # what was finished is not sent again
    settled(hub, loader, model)


def test_killed_between_the_commit_and_the_tag(hub, publisher, model, loader):
    fault = hub.fault("POST", "/tag/", "hang")
    process = publisher.start(model, NAME)
    assert fault.seen.wait(600)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    answer = publisher.run(model, NAME)
    assert not answer["committed"]
    assert hub.store.repositories[NAME].refs[f"refs/tags/{answer['tag']}"] == answer["revision"]
    settled(hub, loader, model)


def test_ctrl_c_is_clean(hub, publisher, model, loader):
    fault = hub.fault("PUT", "/storage/", "hang")
    process = publisher.start(model, NAME)
    assert fault.seen.wait(600)
    process.send_signal(signal.SIGINT)
    out, err = publisher.finish(process, 130)  # though the upload is never answered
    assert out == "" and err.startswith("error: interrupted") and "run it again" in err
    wait_for(lambda: len(hub.store.repositories[NAME].history("main")) == 1)
    publisher.run(model, NAME)
    settled(hub, loader, model)


def test_a_pull_request_whose_answer_is_lost(hub, publisher, model, loader):
    hub.store.create("carol/tiny", False, "carol")
    hub.fault("POST", COMMIT, "apply-drop")
    answer = publisher.run(model, "carol/tiny", "--create-pr")
    assert answer["committed"] and answer["pull_request"] == 1
    assert len(hub.store.repositories["carol/tiny"].pulls) == 1
    settled(hub, loader, model, "carol/tiny", revision="refs/pr/1")


def test_a_pull_request_that_may_still_come_is_not_asked_for_twice(hub, publisher, model):
    hub.store.create("carol/tiny", False, "carol")
    hub.fault("POST", COMMIT, "drop")
    answer = publisher.run(model, "carol/tiny", "--create-pr", status=2)
    assert codes(answer) == {("no-answer", "carol/tiny")}
    publisher.run(model, "carol/tiny", "--create-pr")
    assert len(hub.store.repositories["carol/tiny"].pulls) == 1


def test_the_token_is_nowhere(hub, publisher, model, tmp_path):
    """Everything the server, the logs and the files saw; the client's own frames, which hold it, are not in the error."""
    publisher.run(model, NAME)
    hub.fault("POST", COMMIT, "status", status=403)
    evaluate(model)
    _, err = publisher.finish(publisher.start(model, NAME, HF_DEBUG="1"), 2)
    assert "may not do that" in err
    hub.fault("POST", COMMIT, "status", status=403)
    shown = publisher.start(model, NAME, "-v").communicate()[1]
    assert "Traceback" in shown and not any(secret in shown for secret in SECRETS)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(TOKEN.encode() in path.read_bytes() for path in files)
    with_token = [row for row in hub.seen if TOKEN in row.headers]
    assert with_token and not any("localhost" in row.host for row in with_token)
    assert any("localhost" in row.host for row in hub.seen)  # the control: the other origin was used
    assert not any(TOKEN in row.path or TOKEN.encode() in row.body for row in hub.seen)


def test_an_error_carries_no_frame_of_the_client():
    from huggingface_hub.errors import HfHubHTTPError

    from convert.publishing.hub import ask, hub_utils

    httpx = hub_utils().httpx
    request = httpx.Request("POST", "http://127.0.0.1/x", headers={"Authorization": f"Bearer {TOKEN}"})
    response = httpx.Response(403, request=request)

    def call():
        raise HfHubHTTPError(f"no {TOKEN}", response=response, server_message=f"no {TOKEN} at http://x/y?signature=1")

    with pytest.raises(Exception, match="could not test") as caught:
        ask(call, "test", NAME)
    error = caught.value
    assert error.__cause__ is None and error.__context__ is None
    own = traceback.TracebackException(type(error), error, error.__traceback__.tb_next, capture_locals=True)
    assert "Bearer" not in "".join(own.format()) and TOKEN not in "".join(own.format())
    assert TOKEN not in str(error) and "signature" not in str(error)
