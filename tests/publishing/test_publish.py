"""Publishing where everything works, and the gate: what is refused, and what an excellent publisher does beside."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import yaml
from hub_fixtures import (
    NAME,
    OTHER,
    READ,
    ROOT,
    START,
    TOKEN,
    codes,
    evaluate,
    make_model,
    prove,
    settled,
    sha256,
    write,
)


def test_publishes_the_verified_bytes_in_one_commit(hub, publisher, model, loader):
    answer = publisher.run(model, NAME, "--license", "mit", "--language", "en")
    assert answer["committed"] and answer["created"] and answer["verified"]
    assert answer["visibility"] == "private" and hub.store.repositories[NAME].private
    settled(hub, loader, model)
    repository = hub.store.repositories[NAME]
    assert repository.resolve("main") == answer["revision"] == repository.refs[f"refs/tags/{answer['tag']}"]
    assert repository.commits[answer["revision"]].title == "Model converted from fairseq: tiny"
    assert answer["unknown"] == ["datasets", "base_model"]
    assert {name: digest for name, _, digest in answer["files"]} == {
        path.name: sha256(path) for path in model.iterdir()
    }
    assert hub.count("PUT", "/storage/") == 2  # in parts
    assert loader.logits(NAME, answer["tag"]) == loader.logits(model)


def test_the_client_does_not_hash_what_was_hashed(hub, publisher, model):
    """The bytes are known by then: each further reading takes seconds of a large model."""
    code = "import huggingface_hub.lfs as lfs; lfs.UploadInfo.from_path = lfs.sha_fileobj = None; " + START
    command = [sys.executable, "-c", code, "publish", str(model), NAME, "-q"]
    done = subprocess.run(command, env=publisher.environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert hub.count("PUT", "/storage/") == 2


def test_the_judge_of_these_tests_has_eyes(hub, publisher, model, loader):
    """Control: `settled` notices a commit too many, a changed file, and a model that computes something else."""
    from hub_store import Blob

    publisher.run(model, NAME)
    settled(hub, loader, model)
    files = hub.store.repositories[NAME].files("main")
    with pytest.raises(AssertionError):
        settled(hub, loader, model, commits=1)
    kept, files["vocab.json"] = files["vocab.json"], Blob(b"{}", None, 2)
    with pytest.raises(AssertionError, match=r"vocab\.json"):
        settled(hub, loader, model)
    files["vocab.json"] = kept
    other = model.parent / "other"
    make_model(other, seed=1)
    assert loader.logits(other) != loader.logits(model)


def test_what_the_command_says(publisher, model):
    out, err = publisher.finish(publisher.start("--help"))
    assert err == "" and out.count("fairseq-to-hf publish ") == 3
    out, err = publisher.finish(publisher.start(model, NAME, "-q"))
    assert (out, err) == ("", "")
    out, err = publisher.finish(publisher.start(model, NAME))
    assert err == "" and out.startswith("up to date: alice/tiny, private, verified; no commit was needed\n")
    verified = sha256(model / "vocab.json")[:12]
    (model / "vocab.json").write_text("{}")
    found = sha256(model / "vocab.json")[:12]
    out, err = publisher.finish(publisher.start(model, NAME), 1)
    assert out == "" and err.splitlines() == [
        "error: the model directory is not what was verified; nothing was sent",
        f"  changed: vocab.json: sha256 verified {verified}…, now {found}…",
        "",
        f"hint: fairseq-to-hf verify CHECKPOINT {model}",
    ]


def test_a_second_run_commits_and_uploads_nothing(hub, publisher, model, loader):
    publisher.run(model, NAME)
    hub.seen.clear()
    answer = publisher.run(model, NAME)
    assert not answer["committed"] and answer["changed"] == [] and answer["revision"]
    assert hub.count("POST", "/commit/|/preupload/|/lfs/|/tag/|/create") == 0
    assert hub.count("PUT", "") == 0
    settled(hub, loader, model)


def test_what_changed_is_the_only_thing_sent(hub, publisher, model, loader):
    publisher.run(model, NAME)
    evaluate(model)
    hub.seen.clear()
    answer = publisher.run(model, NAME)
    assert answer["changed"] == ["evaluation.json", "README.md"]
    assert hub.count("PUT", "") == 0
    assert "value: 3.45" in (model / "README.md").read_text()
    settled(hub, loader, model, commits=3)


def test_dry_run_shows_everything_and_writes_nothing(hub, publisher, model):
    out, err = publisher.finish(publisher.start(model, NAME, "--dry-run", "--public"))
    assert err == "" and out.startswith(
        "dry run: alice/tiny, public, verified: would be published; nothing was written"
    )
    for path in model.iterdir():
        assert path.name == "README.md" or re.search(rf"\+ {re.escape(path.name)} .*{sha256(path)}", out)
    assert "\n  to main\n" in out
    assert "model.safetensors" in out and " lfs " in out and "+library_name: transformers" in out
    assert "not known, and therefore not in the card: license, language, datasets, base model" in out
    assert hub.store.repositories == {} and hub.store.objects == {}
    assert {(row.method, row.path) for row in hub.seen if row.method != "GET"} == {("POST", "/api/validate-yaml")}
    assert not (model / "README.md").exists()


def test_dry_run_asks_for_the_token_the_role_and_the_card(hub, publisher, model):
    assert codes(publisher.run(model, NAME, "--dry-run", token=READ, status=2)) == {("read-token", "")}
    answer = publisher.run(model, NAME, "--dry-run", "--license", "MIT", status=1)
    assert codes(answer) == {("card", "README.md")}
    assert codes(publisher.run(model, "someone/tiny", "--dry-run", status=2)) == {("forbidden", "someone/tiny")}


def test_public_is_for_new_repositories_only(hub, publisher, model):
    publisher.run(model, NAME, "--public")
    assert not hub.store.repositories[NAME].private
    hub.store.create("alice/closed", True, "alice")
    answer = publisher.run(model, "alice/closed", "--public")
    assert hub.store.repositories["alice/closed"].private
    assert any("stays so" in note for note in answer["notes"])


def test_organisations_branches_and_tags(hub, publisher, model, loader):
    answer = publisher.run(model, "lab/tiny", "--revision", "experiment", "--tag", "v1.0")
    repository = hub.store.repositories["lab/tiny"]
    assert repository.resolve("experiment") == repository.resolve("v1.0") == answer["revision"]
    assert list(repository.files("main")) == [".gitattributes"]
    assert 'revision = "v1.0"' in repository.files("v1.0")["README.md"].content.decode()
    settled(hub, loader, model, "lab/tiny", revision="experiment")


def test_a_tag_is_never_moved(hub, publisher, model, tmp_path):
    publisher.run(model, NAME, "--tag", "v1")
    before = dict(hub.store.repositories[NAME].refs)
    other = tmp_path / "other"
    make_model(other, seed=1)
    prove(other)
    answer = publisher.run(other, NAME, "--tag", "v1", status=1)
    assert codes(answer) == {("tag", "v1")}
    assert hub.store.repositories[NAME].refs == before


# ---------------------------------------------------------------- the gate


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocab.json", "preprocessor_config.json"])
def test_gate_names_the_file_that_changed(hub, publisher, model, name):
    content = bytearray((model / name).read_bytes())
    place = content.rindex(b"0") if name.endswith("json") and b"0" in content else -9
    content[place] = ord("1") if name.endswith("json") and b"0" in content else content[place] ^ 1
    (model / name).write_bytes(bytes(content))
    assert codes(publisher.run(model, NAME, status=1)) == {("changed", name)}
    assert hub.seen == []  # refused before anybody was asked


def test_gate_refuses_what_was_not_verified(hub, publisher, model):
    proof = json.loads((model / "verification.json").read_text())
    run, control = proof["runs"][0], proof["controls"][0]
    cases = [
        ({"passed": False}, ("not-passed", "verification.json")),
        ({"runs": [run | {"verdict": "different"}]}, ("different", "verification.json")),
        ({"runs": []}, ("no-runs", "verification.json")),
        ({"controls": [control | {"caught": False}]}, ("control", "verification.json")),
        ({"controls": []}, ("no-controls", "verification.json")),
        ({"schema": 2}, ("schema", "verification.json")),
        ({"checkpoint": {"sha256": "0" * 64}}, ("checkpoint", "conversion.json")),
        ({"files": proof["files"] | {"chat.json": "0" * 64}}, ("missing", "chat.json")),
    ]
    from convert.publishing import gate
    from convert.publishing.files import read

    assert gate.check(read(model)).passed  # the control: unchanged, it passes
    for change, expected in cases:
        write(model / "verification.json", proof | change)
        with pytest.raises(Exception) as caught:
            gate.check(read(model))
        assert caught.value.status == 1
        assert {(problem.code, problem.key) for problem in caught.value.problems} == {expected}
    (model / "verification.json").unlink()
    answer = publisher.run(model, NAME, status=1)
    assert codes(answer) == {("no-verification", "verification.json")}
    assert "verify" in answer["hint"]


def test_gate_refuses_an_added_file(model):
    from convert.publishing import gate
    from convert.publishing.files import read

    write(model / "generation_config.json", {})
    with pytest.raises(Exception, match="not what was verified") as caught:
        gate.check(read(model))
    assert [str(problem) for problem in caught.value.problems] == [
        "generation_config.json: was not there when the model was verified"
    ]


def test_unverified_says_so_everywhere_in_the_first_line(hub, publisher, model, loader):
    (model / "verification.json").unlink()
    answer = publisher.run(model, NAME, "--unverified")
    repository = hub.store.repositories[NAME]
    commit = repository.commits[answer["revision"]]
    assert not answer["verified"] and commit.title.startswith("UNVERIFIED: ")
    assert answer["tag"].startswith("unverified-") and repository.messages[answer["tag"]].startswith("UNVERIFIED: ")
    card = commit.files["README.md"].content.decode()
    assert "- unverified\n" in card.split("---")[1]
    first = next(line for line in card.split("---\n", 2)[2].splitlines() if line and not line.startswith("<!--"))
    assert first.startswith("> **UNVERIFIED**") and "the weights are identical" not in card
    settled(hub, loader, model)
    # a later verification takes all of it back
    prove(model)
    publisher.run(model, NAME)
    card = (model / "README.md").read_text()
    assert "unverified" not in card.lower()
    settled(hub, loader, model, commits=3)
    # and an unverified model over a verified one does not keep the other's proof
    (model / "verification.json").unlink()
    assert publisher.run(model, NAME, "--unverified")["deleted"] == ["verification.json"]
    settled(hub, loader, model, commits=4)


def test_unverified_has_to_load(hub, publisher, model):
    (model / "config.json").write_text(
        (model / "config.json").read_text().replace('"vocab_size": 32', '"vocab_size": 33')
    )
    answer = publisher.run(model, NAME, "--unverified", status=2)
    assert codes(answer) == {("mismatched-keys", f"lm_head.{name}") for name in ("bias", "weight")}
    assert hub.seen == []


# ---------------------------------------------------------------- what may leave


def test_only_files_of_the_model_leave(hub, publisher, model, loader):
    outside = ("pytorch_model.bin", "optimizer.pt", ".env", ".DS_Store", "notes.txt")
    for name in outside:
        (model / name).write_bytes(b"x")
    (model / ".git").mkdir()
    (model / ".git" / "config").write_text("x")
    (model / "runs").symlink_to("/")
    answer = publisher.run(model, NAME)
    assert {name for name, _ in answer["left_out"]} == {*outside, ".git/config", "runs"}
    there = set(hub.store.repositories[NAME].files("main"))
    assert there == {".gitattributes", "README.md", *(name for name, _, _ in answer["files"])}
    assert not there & {*outside}


def test_links_tokens_and_paths_do_not_leave(model, tmp_path):
    from convert.publishing.files import read

    (tmp_path / "elsewhere.json").write_text("{}")
    (model / "added_tokens.json").symlink_to(tmp_path / "elsewhere.json")
    (model / "evaluation.json").write_text(json.dumps({"command": f"HF_TOKEN={TOKEN} evaluate"}))
    conversion = json.loads((model / "conversion.json").read_text())
    conversion["settings"]["task"] |= {"data": "/checkpoint/someone/data", "cache": "file:///tmp/x", "labels": "a/b"}
    conversion["dictionary"]["symbols"].append("/a/")  # a phoneme, and no path
    write(model / "conversion.json", conversion)
    with pytest.raises(Exception, match="must not be published as they are") as caught:
        read(model)
    assert [(problem.code, problem.key, problem.detail) for problem in caught.value.problems] == [
        ("link-outside", "added_tokens.json", "is a link to a file outside the model directory"),
        ("private-path", "conversion.json", "settings.task.cache names a path of the machine it was made on"),
        ("private-path", "conversion.json", "settings.task.data names a path of the machine it was made on"),
        ("token", "evaluation.json", "holds what looks like a token or a password"),
    ]
    assert TOKEN not in str(caught.value.problems)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (TOKEN, True),
        (f"x_{TOKEN}", True),
        ("glpat-" + "aB3-" * 5, True),
        ("AIza" + "Sy_A1" * 7, True),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmN", True),
        ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG", True),
        ('"wandb_api_key": "0123456789abcdef0123"', True),
        ("password=hunter2hunter2", True),
        ('token = os.environ["ACCESS_TOKEN_2"]; access_token=os.environ["HF_TOKEN2"]', False),
        ('api_key="your_key_goes_here"', False),
        ('"pad_token": "<pad>", "secret": 12, "password": null, "access_token_id": 4', False),
        ("The secret of 2 passwords: see https://example.org:80/a@b", False),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_what_looks_like_a_token(model, text, found, encoding):
    from convert.publishing.files import read

    (model / "NOTICE").write_bytes(text.encode(encoding))
    if not found:
        assert "NOTICE" in read(model).files
        return
    with pytest.raises(Exception, match="must not be published as they are") as caught:
        read(model)
    assert [(problem.code, problem.key) for problem in caught.value.problems] == [("token", "NOTICE")]


def test_a_link_inside_the_directory_is_a_file(model):
    from convert.publishing.files import read

    (model / "LICENSE").write_text("text")
    (model / "NOTICE").symlink_to("LICENSE")
    assert {"LICENSE", "NOTICE"} <= set(read(model).files)


def test_files_of_another_model_are_not_mixed_in(hub, publisher, model, loader):
    hub.store.create(NAME, True, "alice")
    repository = hub.store.repositories[NAME]
    repository.edit("tokenizer.json", b"{}")
    repository.edit("notes.txt", b"mine")
    answer = publisher.run(model, NAME, status=1)
    assert codes(answer) == {("stale", "tokenizer.json")}
    answer = publisher.run(model, NAME, "--delete-stale")
    assert answer["deleted"] == ["tokenizer.json"]
    assert "notes.txt" in repository.files("main")
    assert loader.logits(NAME) == loader.logits(model)


def test_check_loads_from_the_hub_and_compares(hub, publisher, model):
    assert publisher.run(model, NAME, "--check")["checked"] is True


def test_check_sees_a_hub_that_hands_out_another_model(hub, publisher, model, tmp_path):
    """Of the same size and under the right hash, as the client compares sizes only."""
    make_model(tmp_path / "other", seed=1)

    def exchange():
        hub.store.objects[sha256(model / "model.safetensors")] = (tmp_path / "other/model.safetensors").read_bytes()

    hub.fault("GET", "/storage/", before=exchange)
    answer = publisher.run(model, NAME, "--check", status=1)
    assert codes(answer) == {("logits", "logits")}


def test_check_has_eyes(model, tmp_path):
    from convert.publishing.check import compute, same

    make_model(tmp_path / "other", seed=1)
    found = compute(str(model), "Wav2Vec2ForCTC")
    same(found, found, NAME, "0" * 40)
    with pytest.raises(AssertionError, match="computes different logits from the verified model"):
        same(found, compute(str(tmp_path / "other"), "Wav2Vec2ForCTC"), NAME, "0" * 40)


def test_as_a_function(hub, publisher, model, monkeypatch):
    """`convert.publish` is the same thing, whichever way its module was imported before."""
    import subprocess
    import sys

    code = (
        "import sys, convert, convert.publishing.card\n"
        "done = convert.publish(sys.argv[1], sys.argv[2])\n"
        "print(type(done).__name__, done.committed, done.repo_id)"
    )
    command = [sys.executable, "-c", code, str(model), NAME]
    result = subprocess.run(command, env=publisher.environment(), capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["Published", "True", NAME]


# ---------------------------------------------------------------- pull requests


def test_a_pull_request_is_made_once_and_gone_on_with(hub, publisher, model, loader):
    hub.store.create("carol/tiny", False, "carol")
    repository = hub.store.repositories["carol/tiny"]
    assert codes(publisher.run(model, "carol/tiny", status=2)) == {("forbidden", "carol/tiny")}
    assert codes(publisher.run(model, "carol/nothing", "--create-pr", status=2)) == {("not-found", "carol/nothing")}
    assert publisher.run(model, "carol/tiny", "--create-pr", "--dry-run")["target"] == "a new pull request"
    answer = publisher.run(model, "carol/tiny", "--create-pr")
    assert answer["pull_request"] == 1 and answer["tag"] is None
    assert [pull.title for pull in repository.pulls] == ["Model converted from fairseq: tiny"]
    again = publisher.run(model, "carol/tiny", "--create-pr")
    assert not again["committed"] and again["pull_request"] == 1
    evaluate(model)
    more = publisher.run(model, "carol/tiny", "--create-pr")
    assert more["committed"] and more["pull_request"] == 1 and len(repository.pulls) == 1
    assert list(repository.files("main")) == [".gitattributes"]
    settled(hub, loader, model, "carol/tiny", commits=3, revision="refs/pr/1")


def test_a_merged_pull_request_needs_no_second_one(hub, publisher, model):
    hub.store.create("carol/tiny", False, "carol")
    repository = hub.store.repositories["carol/tiny"]
    publisher.run(model, "carol/tiny", "--create-pr")
    repository.refs["refs/heads/main"] = repository.refs["refs/pr/1"]
    repository.pulls[0].status = "merged"
    answer = publisher.run(model, "carol/tiny", "--create-pr")
    assert not answer["committed"] and answer["pull_request"] is None and len(repository.pulls) == 1


def test_a_pull_request_of_ours_about_something_else_is_left_alone(hub, publisher, model):
    from hub_store import Blob

    hub.store.create("carol/tiny", False, "carol")
    repository = hub.store.repositories["carol/tiny"]
    fixed = repository.commit("main", None, {"notes.txt": Blob(b"x", None, 1)}, (), "Fix a typo", "", "alice", True)
    assert fixed[1] == 1
    assert publisher.run(model, "carol/tiny", "--create-pr")["pull_request"] == 2
    assert repository.resolve("refs/pr/1") == fixed[0]


def test_somebody_elses_pull_request_is_left_alone(hub, publisher, model):
    hub.store.create("carol/tiny", False, "carol")
    publisher.run(model, "carol/tiny", "--create-pr", token=OTHER)
    answer = publisher.run(model, "carol/tiny", "--create-pr")
    assert answer["pull_request"] == 2


@pytest.mark.parametrize("options", [["--create-pr", "--tag", "v1"], ["--create-pr", "--revision", "dev"]])
def test_options_that_contradict(publisher, model, options):
    assert codes(publisher.run(model, NAME, *options, status=2)) == {("usage", "")}


def test_names_that_are_none_reach_neither_card_nor_hub():
    from convert.errors import ConvertError
    from convert.publishing import Stated, publish

    kinds = {
        "--tag": lambda name: {"tag": name},
        "--revision": lambda name: {"revision": name},
        "--license": lambda name: {"stated": Stated(license=name)},
        "--language": lambda name: {"stated": Stated(language=("en", name))},
        "--dataset": lambda name: {"stated": Stated(datasets=(name,))},
        "--base-model": lambda name: {"stated": Stated(base_model=name)},
    }
    marks = (
        "",
        "a b",
        "a\n---\nb",
        "<!-- fairseq-to-hf: end -->",
        "../a",
        "a\u202eb",
        "-a",
        "a/../c",
        "a/",
        "a'b",
        'a"b',
    )
    wrong = {option: [*marks] for option in kinds}
    for option in ("--tag", "--revision"):
        wrong[option] += ["a..b", "a.lock", "a//b", "a.", "a/.b", "a" * 201]
    for option, names in wrong.items():
        for name in names:
            with pytest.raises(ConvertError) as refused:
                publish("absent", NAME, **kinds[option](name))
            assert [(problem.code, problem.key) for problem in refused.value.problems] == [("name", option)]
    good = {"tag": "v1.0+x/y", "revision": "refs/pr/1"}
    with pytest.raises(ConvertError, match="no such directory"):
        publish("absent", NAME, **good, stated=Stated("cc-by-nc-4.0", ("zh-Hans",), ("a/b_c", "squad"), "me/m.x"))


def test_the_manual_runs(hub, publisher, model, tmp_path):
    """The commands and the Python of docs/publishing.md, as they stand; the model directory has the name it has there."""
    import subprocess
    import sys

    text = (ROOT / "docs" / "publishing.md").read_text("utf-8")
    hub.store.users[TOKEN]["name"] = "me"
    try:
        (commands,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        for line in commands.splitlines():
            command = [sys.executable, "-m", "convert", *line.split()[1:]]
            subprocess.run(command, cwd=tmp_path, env=publisher.environment(), check=True, capture_output=True)
        (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=tmp_path, env=publisher.environment(), check=True, capture_output=True, text=True
        )
        assert done.stdout.split()[2].startswith("verified-")
        (job,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
        steps = yaml.safe_load(job)["jobs"]["publish"]["steps"]
        line = next(step["run"] for step in steps if "publish" in step.get("run", ""))
        command = [sys.executable, "-m", "convert", *line.replace('"$GITHUB_REF_NAME"', "v1.0").split()[1:]]
        subprocess.run(command, cwd=tmp_path, env=publisher.environment(), check=True, capture_output=True)
    finally:
        hub.store.users[TOKEN]["name"] = "alice"
    assert "refs/tags/v1.0" in hub.store.repositories["me/my-model"].refs


def test_not_a_model_directory(publisher, tmp_path, model):
    assert codes(publisher.run(tmp_path / "nothing", NAME, status=2)) == {("no-directory", str(tmp_path / "nothing"))}
    (tmp_path / "empty").mkdir()
    assert codes(publisher.run(tmp_path / "empty", NAME, status=2)) == {("no-model", "empty")}
    assert codes(publisher.run(model, "tiny", status=2)) == {("name", "tiny")}
