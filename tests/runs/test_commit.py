"""A result is complete or absent: on a local disk, on S3, in memory, under races and faults."""

from __future__ import annotations

import errno
import json
import math
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import mixtures
import pytest
import safetensors.torch
import torch
from conftest import S3Server
from fsspec.implementations.memory import MemoryFileSystem

from gmm_dist.errors import UserError
from gmm_dist.model.covariance import COVARIANCE_TYPES
from gmm_dist.model.mixture import Mixture
from gmm_dist.model.parameters import Parameters
from gmm_dist.model.quantiles import Quantiles
from gmm_dist.runs import load as artifacts
from gmm_dist.runs.folder import Folder
from gmm_dist.runs.json_files import FileEntry
from gmm_dist.runs.load import Attempt, Provenance, claim, load, read_report, repair
from gmm_dist.storage import Patience, open_url

PROVENANCE = Provenance(
    criteria={"bic": 12.5, "aic": 11.25, "icl": math.nan},
    status="the gain in mean log-likelihood fell below tol",
    converged=True,
    n_iter=17,
    config={"tol": 1e-3, "covariance_type": "full"},
    plan_hash="c0ffee",
    versions={"python": "3.11"},
)
REPORT = {"criterion": "bic", "candidates": [{"k": 2, "bic": 12.5}, {"k": 3, "bic": math.inf}]}
FILES = {"model/model.safetensors", "model/model.json", "sweep.json"}


def mixture(covariance_type: str = "full", seed: int = 0) -> Mixture:
    draw = torch.Generator().manual_seed(seed)
    means = torch.randn(3, 2, generator=draw, dtype=torch.float64)
    parameters = mixtures.parameters(covariance_type, 3, 2, seed=seed)
    return Mixture(
        parameters=replace(parameters, means=means),
        feature_names=("delay", "größe"),
        n_samples=1e6 / 3,
        log_likelihood=-1e5 / 7,
    )


def write(attempt: Attempt, model: Mixture) -> None:
    attempt.write_model(model, PROVENANCE)
    attempt.write_json("sweep.json", REPORT)


def commit(url: str, model: Mixture | None = None) -> str:
    with claim(url) as attempt:
        write(attempt, model or mixture())
        attempt.commit()
    return attempt.id


def same(a: Mixture, b: Mixture) -> bool:
    ours, theirs = (
        (m.parameters.weights, m.parameters.means, m.parameters.covariances) for m in (a, b)
    )
    facts, others = (
        (m.covariance_type, m.feature_names, m.n_samples, m.log_likelihood) for m in (a, b)
    )
    return all(map(torch.equal, ours, theirs)) and facts == others


def files(url: str) -> set[str]:
    """The files below `url`, by name, without attempts."""
    fs, path = open_url(url)
    fs.invalidate_cache()
    names = {name[len(path) :].lstrip("/") for name in fs.find(path)}
    return {name for name in names if not name.startswith("_attempts/")}


def attempts(url: str) -> set[str]:
    fs, path = open_url(url)
    fs.invalidate_cache()
    return {name[len(path) :].split("/")[2] for name in fs.find(f"{path}/_attempts")}


def change(url: str, name: str, edit: Callable[[bytes], bytes]) -> None:
    fs, path = open_url(url)
    fs.pipe_file(f"{path}/{name}", edit(fs.cat_file(f"{path}/{name}")))


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def entry(**changes: Any) -> Callable[[bytes], bytes]:
    """Return an edit of a JSON file that sets entries, or removes those that are None."""

    def edit(data: bytes) -> bytes:
        content = json.loads(data) | changes
        return json.dumps({k: v for k, v in content.items() if v is not None}).encode()

    return edit


@pytest.fixture(params=["local", "s3", "memory"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place for results that does not exist yet."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_lake').url}/deep/out"
    if request.param == "memory":
        return f"memory://artifacts/{tmp_path.name}/out"
    return str(tmp_path / "deep" / "out")


@pytest.fixture
def local(tmp_path: Path) -> str:
    return str(tmp_path / "out")


# ------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_a_model_comes_back_bit_for_bit(out: str, covariance_type: str) -> None:
    model = mixture(covariance_type)
    commit(out, model)
    assert same(load(out), model)
    assert same(load(f"{out}/model"), model)
    assert same(load(f"{out}/model/"), model)


def test_committed_files_lie_where_people_look(out: str) -> None:
    commit(out)
    assert files(out) == {"manifest.json", *FILES}
    card = read_json(f"{out}/model/model.json")
    assert card["covariance_type"] == "full"
    assert (card["n_components"], card["n_features"]) == (3, 2)
    assert card["feature_names"] == ["delay", "größe"]
    assert card["criteria"] == {"bic": 12.5, "aic": 11.25, "icl": None}
    assert (card["converged"], card["n_iter"], card["plan_hash"]) == (True, 17, "c0ffee")
    assert read_report(out)["candidates"][1] == {"k": 3, "bic": None}


def read_json(url: str) -> dict[str, Any]:
    fs, path = open_url(url)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return dict(json.loads(fs.cat_file(path), parse_constant=refuse))


def test_the_manifest_names_the_attempt_and_its_files(out: str) -> None:
    winner = commit(out)
    manifest = read_json(f"{out}/manifest.json")
    assert manifest["attempt"] == winner
    assert set(manifest["files"]) == FILES
    fs, path = open_url(out)
    for name, facts in manifest["files"].items():
        data = fs.cat_file(f"{path}/_attempts/{winner}/{name}")
        assert FileEntry(**facts).fits(data)


def test_equal_models_are_equal_bytes(tmp_path: Path) -> None:
    model = mixture()
    part = model.parameters
    # The same numbers, once as views into a larger tensor.
    views = Parameters(
        weights=part.weights,
        means=part.means.T.clone().T,
        covariances=torch.stack([part.covariances] * 2)[1],
        covariance_type="full",
    )
    commit(str(tmp_path / "a"), model)
    commit(
        str(tmp_path / "b"),
        Mixture(
            parameters=views, feature_names=model.feature_names, n_samples=1.0, log_likelihood=-1.0
        ),
    )
    names = [tmp_path / run / "model" / "model.safetensors" for run in "ab"]
    assert names[0].read_bytes() == names[1].read_bytes()
    assert b"__metadata__" not in names[0].read_bytes()


def test_unknown_likelihood_comes_back_as_nan(local: str) -> None:
    commit(local, Mixture(parameters=mixture().parameters))
    assert math.isnan(load(local).log_likelihood)
    assert math.isnan(load(local).n_samples)


def test_quantiles_come_back_beside_the_same_tensors(tmp_path: Path) -> None:
    plain, kept = mixture(), Quantiles((0.0, 0.1, 1.0), (-17.3, -1e-9, 2 / 3))
    commit(str(tmp_path / "a"), plain)
    commit(str(tmp_path / "b"), replace(plain, log_density_quantiles=kept))
    assert load(str(tmp_path / "a")).log_density_quantiles is None
    assert load(str(tmp_path / "b")).log_density_quantiles == kept
    names = [tmp_path / run / "model" / "model.safetensors" for run in "ab"]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_models_of_a_time_without_quantiles_still_load(tmp_path: Path) -> None:
    commit(str(tmp_path / "out"))
    alone = shutil.copytree(tmp_path / "out" / "model", tmp_path / "alone")
    change(str(alone), "model.json", entry(log_density_quantiles=None))
    assert "quantiles" not in (alone / "model.json").read_text()
    assert load(str(alone)).log_density_quantiles is None


def test_library_versions() -> None:
    versions = artifacts.library_versions(["torch", "no-such-package"])
    assert versions["python"].startswith("3.")
    assert versions["torch"] == torch.__version__
    assert versions["no-such-package"] is None


def test_a_model_folder_may_be_copied_on_its_own(local: str, tmp_path: Path) -> None:
    commit(local)
    alone = shutil.copytree(Path(local) / "model", tmp_path / "elsewhere")
    assert same(load(str(alone)), mixture())


def test_a_whole_output_may_be_moved(local: str, tmp_path: Path) -> None:
    commit(local)
    moved = Path(local).rename(tmp_path / "moved")
    assert same(load(str(moved)), mixture())


# ------------------------------------------------------------------------- claiming a place


def test_a_committed_result_is_never_overwritten(out: str) -> None:
    commit(out)
    with pytest.raises(UserError, match=r"already holds a committed result .*another output"):
        commit(out, mixture(seed=1))
    assert same(load(out), mixture())


def test_a_place_with_other_files_is_refused(out: str) -> None:
    fs, path = open_url(out)
    fs.makedirs(path, exist_ok=True)
    fs.pipe_file(f"{path}/notes.txt", b"mine")
    with pytest.raises(UserError, match=r"is not empty \(1 entries, first 'notes.txt'\)"):
        commit(out)
    assert files(out) == {"notes.txt"}


def test_a_file_is_refused_as_a_place(out: str) -> None:
    fs, path = open_url(out)
    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    fs.pipe_file(path, b"mine")
    with pytest.raises(UserError, match="is a file, and results need a folder"):
        commit(out)


def test_an_empty_folder_will_do(out: str) -> None:
    fs, path = open_url(out)
    if out.startswith("s3://"):
        fs.pipe_file(f"{path}/", b"")  # What S3's console makes of "create folder".
    else:
        fs.makedirs(path)
    commit(out)
    assert same(load(out), mixture())


def test_leftovers_of_a_dead_attempt_are_tolerated(out: str) -> None:
    fs, path = open_url(out)
    dead = f"{path}/_attempts/20010101T000000Z-dead"
    fs.makedirs(dead, exist_ok=True)
    fs.pipe_file(f"{dead}/sweep.json", b"{")
    with pytest.raises(UserError, match=r"holds unfinished attempts and no manifest.json"):
        load(out)
    commit(out)
    assert same(load(out), mixture())


def test_a_place_that_cannot_be_written_is_refused_at_once() -> None:
    # Nobody, root included, makes folders in sysfs.
    with pytest.raises(UserError, match=r"/sys/out"), claim("/sys/out"):
        pytest.fail("work began")


def test_a_place_below_a_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/out"), claim(str(tmp_path / "file" / "out")):
        pytest.fail("work began")


def test_a_bucket_that_does_not_exist_is_refused_at_once(s3_lake: S3Server) -> None:
    url = "s3://no-such-bucket/out"
    with pytest.raises(UserError, match=f"{url}: the bucket does not exist"), claim(url):
        pytest.fail("work began")
    with pytest.raises(UserError, match=f"{url}: the bucket does not exist"):
        load(url)


def test_wrong_credentials_are_refused_at_once(
    s3_lake: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    url = f"{s3_lake.url}/out"
    with pytest.raises(UserError, match=f"{url}: access denied"), claim(url):
        pytest.fail("work began")


class Overwriting(MemoryFileSystem):
    """A store that ignores the condition of a conditional write (rclone serve s3 is one)."""

    protocol = "overwriting"
    store: dict[str, Any] = {}  # noqa: RUF012 - fsspec's own way: one store per class
    pseudo_dirs = [""]  # noqa: RUF012

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        super().pipe_file(path, value, mode="overwrite")


def test_a_store_without_create_if_absent_is_refused_at_once() -> None:
    fsspec.register_implementation("overwriting", Overwriting, clobber=True)
    with pytest.raises(UserError, match="overwrites files"), claim("overwriting://out"):
        pytest.fail("work began")
    assert not Overwriting.store


# ------------------------------------------------------------------------- failing


def test_a_failed_run_leaves_nothing(out: str) -> None:
    fs, path = open_url(out)

    def fail() -> None:
        with claim(out) as attempt:
            write(attempt, mixture())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    fs.invalidate_cache()
    # SeaweedFS goes on to list the emptied folder, and S3 has no folders.
    assert not [name for name, info in fs.find(path, detail=True).items() if info["type"] == "file"]
    assert not Path(out).exists()
    commit(out)
    assert same(load(out), mixture())


def test_a_failed_run_removes_only_folders_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(ZeroDivisionError), claim(str(tmp_path / "old" / "new" / "out")):
        raise ZeroDivisionError
    assert list(tmp_path.rglob("*")) == [tmp_path / "old"]


def test_a_block_without_commit_leaves_nothing(local: str) -> None:
    with claim(local) as attempt:
        write(attempt, mixture())
    assert not Path(local).exists()


def test_the_loser_of_a_race_says_who_won_and_leaves_nothing(out: str) -> None:
    def lose(winner: Attempt) -> None:
        with claim(out) as loser:
            write(loser, mixture(seed=1))
            winner.commit()
            loser.commit()

    with claim(out) as winner:
        write(winner, mixture())
        with pytest.raises(UserError, match=rf"its result \(attempt {winner.id}\) while this one"):
            lose(winner)
    assert attempts(out) == {winner.id}
    assert same(load(out), mixture())


class Forgetful(MemoryFileSystem):
    """A store that does what it is asked to, and whose answers to creations may get lost."""

    protocol = "forgetful"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    lost = 0

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        if not path.endswith("manifest.json"):
            super().pipe_file(path, value, mode=mode)
            return
        if not self.exists(path):
            super().pipe_file(path, value, mode=mode)
        if Forgetful.lost > 0:
            Forgetful.lost -= 1
            raise ConnectionResetError("the answer is lost")
        raise FileExistsError(path)


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> str:
    fsspec.register_implementation("forgetful", Forgetful, clobber=True)
    monkeypatch.setattr("gmm_dist.storage.PATIENCE", Patience(0.05, first_pause=0.01))
    Forgetful.store.clear()
    return "forgetful://out"


def test_a_lost_answer_to_our_commit_is_no_lost_race(forgetful: str) -> None:
    Forgetful.lost = 1
    commit(forgetful)
    assert same(load(forgetful), mixture())


def test_files_of_a_manifest_that_is_there_stay_when_its_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        if (path / "manifest.json").exists():
            raise OSError(errno.EIO, "the disk fails")

    monkeypatch.setattr("gmm_dist.runs.compare_and_swap.sync", fail)
    with pytest.raises(OSError, match="the disk fails"):
        commit(str(tmp_path / "out"))
    assert same(load(str(tmp_path / "out")), mixture())


def test_files_of_a_commit_of_unknown_fate_stay(forgetful: str) -> None:
    Forgetful.lost = 1_000_000
    with pytest.raises(Exception, match="the answer is lost"):
        commit(forgetful)
    # It had been committed: had the files been removed, the result would be destroyed.
    assert same(load(forgetful), mixture())


# ------------------------------------------------------------------------- reading


def test_nothing_there(out: str) -> None:
    with pytest.raises(UserError, match=r"holds no result, neither manifest.json nor model.json"):
        load(out)
    with pytest.raises(UserError, match=r"holds no result"):
        read_report(out)
    with pytest.raises(UserError, match=r"holds no result"):
        repair(out)


def test_readers_see_nothing_of_an_attempt(out: str) -> None:
    with claim(out) as attempt:
        write(attempt, mixture())
        for read in (load, read_report, repair):
            with pytest.raises(UserError, match="the run is at work, or died before its commit"):
                read(out)
        with pytest.raises(UserError, match=r"lies inside _attempts, where nothing is committed"):
            load(f"{out}/_attempts/{attempt.id}/model")


def test_copies_are_repaired(out: str) -> None:
    winner = commit(out)
    assert repair(out) == ()
    change(out, "model/model.safetensors", flip)
    fs, path = open_url(out)
    fs.rm_file(f"{path}/sweep.json")
    assert same(load(f"{out}/model"), mixture())
    assert repair(out) == ("model/model.safetensors", "sweep.json")
    for name in FILES:
        own = fs.cat_file(f"{path}/_attempts/{winner}/{name}")
        assert fs.cat_file(f"{path}/{name}") == own


def test_equal_copies_stand_in_for_a_removed_attempt(out: str) -> None:
    commit(out)
    Folder.of(out).remove("_attempts")
    assert same(load(out), mixture())
    assert read_report(out)["criterion"] == "bic"


@pytest.mark.parametrize("name", sorted(FILES))
def test_damaged_files_are_refused(out: str, name: str) -> None:
    winner = commit(out)
    change(out, name, flip)
    change(out, f"_attempts/{winner}/{name}", flip)
    read = read_report if name == "sweep.json" else load
    with pytest.raises(UserError, match=rf"{name} is missing or damaged .*restore _attempts/"):
        read(out)
    with pytest.raises(UserError, match=rf"{name} is missing or damaged"):
        repair(out)


def test_a_report_that_was_not_written(local: str) -> None:
    with claim(local) as attempt:
        attempt.write_model(mixture(), PROVENANCE)
        attempt.commit()
    with pytest.raises(UserError, match=r"manifest.json lists no 'sweep.json' but model/model"):
        read_report(local)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (entry(format_version=2), r"has format version 2, this gmm_dist reads 1 at most: upgrade"),
        (entry(format_version=None), r"is damaged or not ours \(KeyError: 'format_version'\)"),
        (lambda data: data[:-9], r"is damaged or not ours \(JSONDecodeError"),
        (lambda data: b"[]", r"is damaged or not ours"),
        (entry(files=None), r"lacks an entry \(KeyError: 'files'\)"),
    ],
)
@pytest.mark.parametrize("name", ["manifest.json", "model.json"])
def test_what_cannot_be_read_is_refused(
    local: str, tmp_path: Path, name: str, edit: Callable[[bytes], bytes], message: str
) -> None:
    commit(local)
    alone = str(shutil.copytree(Path(local) / "model", tmp_path / "alone"))
    place = local if name == "manifest.json" else alone
    change(place, name, edit)
    with pytest.raises(UserError, match=rf"^{place}: {name} {message}"):
        load(place)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (flip, r"model.safetensors is damaged: \d+ bytes"),
        (lambda data: data[:-8], r"model.safetensors is damaged: \d+ bytes where model.json says"),
    ],
)
def test_a_damaged_copied_folder_is_refused(
    local: str, edit: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    commit(local)
    alone = str(shutil.copytree(Path(local) / "model", tmp_path / "alone"))
    change(alone, "model.safetensors", edit)
    with pytest.raises(UserError, match=message):
        load(alone)


def test_an_incomplete_copied_folder_is_refused(local: str, tmp_path: Path) -> None:
    commit(local)
    alone = shutil.copytree(Path(local) / "model", tmp_path / "alone")
    change(str(alone), "model.json", entry(covariance_type="tied"))
    with pytest.raises(UserError, match=r"model.json says 'tied', 3 components, 2 features"):
        load(str(alone))
    (alone / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model.safetensors is missing beside model.json"):
        load(str(alone))


# ------------------------------------------------------------------------- numbers of no mixture


def saved(part: Parameters, **changes: Any) -> bytes:
    """Return a model.safetensors of these parameters, some of them changed."""
    tensors = {
        name: getattr(part, name).clone() for name in ("weights", "means", "covariances")
    } | changes
    return safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()})


def refitted(alone: Path, tensors: bytes, **changes: Any) -> str:
    """Write a model folder whose hashes fit; return its place."""
    entries = {"files": {"model.safetensors": vars(FileEntry.of(tensors))}} | changes
    (alone / "model.safetensors").write_bytes(tensors)
    change(str(alone), "model.json", lambda data: json.dumps(json.loads(data) | entries).encode())
    return str(alone)


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def altered(name: str, place: tuple[int, ...], value: float) -> Callable[[Parameters], Any]:
    def alter(part: Parameters) -> dict[str, torch.Tensor]:
        tensor = getattr(part, name).clone()
        tensor[place] = value
        return {name: tensor}

    return alter


BAD_NUMBERS = {
    "NaN mean": ("full", altered("means", (1, 0), math.nan), r"means\[1, 0\] is nan"),
    "inf weight": ("diag", altered("weights", (2,), math.inf), r"weights\[2\] is inf"),
    "inf covariance": ("tied", altered("covariances", (0, 1), -math.inf), "is -inf"),
    "negative weight": (
        "full",
        lambda part: {"weights": doubles(0.7, 0.4, -0.1)},
        "component 2 has the weight -0.1",
    ),
    "sum of weights": (
        "full",
        lambda part: {"weights": 0.9 * part.weights},
        "weights sum to 0.9, not to 1",
    ),
    "no weight": ("full", lambda part: {"weights": 0 * part.weights}, "weights sum to 0, not"),
    "asymmetric": (
        "full",
        altered("covariances", (0, 0, 1), 0.9),
        r"component 0 has a covariance that is not symmetric: 0\.9 at \(0, 1\)",
    ),
    "indefinite": (
        "full",
        altered("covariances", (1, 1, 1), -1.0),
        "component 1 has a covariance that is not positive definite",
    ),
    "singular": ("tied", lambda part: {"covariances": doubles(1, 1).outer(doubles(1, 1))}, "share"),
    "no variance": ("diag", altered("covariances", (2, 0), 0.0), "component 2 has a variance"),
    "negative": ("spherical", altered("covariances", (0,), -3.0), "component 0 has a variance"),
    "float32": ("full", lambda part: {"means": part.means.float()}, "means of torch.float32"),
    "whole numbers": ("diag", lambda part: {"means": part.means.long()}, "torch.int64"),
    "shape": ("diag", lambda part: {"means": part.means.T}, r"holds {.*\(2, 3\).*says 'diag'"),
    "one more": ("diag", lambda part: {"more": part.means + 1}, "'more'"),
}


@pytest.mark.parametrize(("kind", "changes", "message"), BAD_NUMBERS.values(), ids=BAD_NUMBERS)
def test_numbers_of_no_mixture_are_refused_in_one_line(
    kind: str, changes: Callable[[Parameters], Any], message: str, local: str, tmp_path: Path
) -> None:
    model = mixture(kind)
    commit(local, model)
    alone = shutil.copytree(Path(local) / "model", tmp_path / "alone")
    place = refitted(alone, saved(model.parameters))
    assert same(load(place), model)
    refitted(alone, saved(model.parameters, **changes(model.parameters)))
    with pytest.raises(UserError, match=rf"^{place}: model\.safetensors .*{message}") as error:
        load(place)
    assert "\n" not in str(error.value)
    assert "copy the model folder again" in str(error.value)


LEVELS = [0.0, 0.5, 1.0]
BAD_CARDS: dict[str, tuple[dict[str, Any], str]] = {
    "few names": ({"feature_names": ["a"]}, "names 1 features of 2"),
    "doubled name": ({"feature_names": ["a", "a"]}, "names the feature 'a' twice"),
    "names of numbers": ({"feature_names": [1, 2]}, "no list of names"),
    "a name for names": ({"feature_names": "ab"}, "no list of names"),
    "doubled ids": ({"component_ids": [4, 1, 4]}, "gives the id 4 to two components"),
    "negative id": ({"component_ids": [0, 1, -2]}, "not 3 whole numbers from 0 up"),
    "few ids": ({"component_ids": [0, 1]}, "not 3 whole numbers"),
    "ids of halves": ({"component_ids": [0, 1, 2.5]}, "not 3 whole numbers"),
    "ids of truth": ({"component_ids": [True, False, 2]}, "not 3 whole numbers"),
    "ids as text": ({"component_ids": "012"}, "not 3 whole numbers"),
    "no family": ({"covariance_type": "banded"}, "says 'banded'"),
    "a list of families": ({"covariance_type": ["full"]}, r"says \['full'\]"),
    "k": ({"n_components": 4}, "4 components, 2 features"),
    "k as text": ({"n_components": "3"}, "holds {"),
    "k absent": ({"n_components": None}, "None components"),
    "n as text": ({"n_samples": "many"}, "has the n_samples 'many'"),
    "n below 0": ({"n_samples": -1}, "has the n_samples -1"),
    "NaN": ({"log_likelihood": math.nan}, "NaN is no JSON"),
    "beyond": ({"log_likelihood": 10**400}, "has the log_likelihood 1000"),
    "falling": ({"log_density_quantiles": {"levels": LEVELS, "values": [1, 3, 2]}}, "not ascend"),
    "levels": ({"log_density_quantiles": {"levels": LEVELS[::-1], "values": LEVELS}}, "not ascend"),
    "few": ({"log_density_quantiles": {"levels": LEVELS, "values": [1]}}, "1 quantiles for 3"),
    "none": ({"log_density_quantiles": {"levels": [], "values": []}}, "0 quantiles for 0"),
    "beyond 1": ({"log_density_quantiles": {"levels": [0, 2], "values": [0, 1]}}, "from 0 to 1"),
    "text": ({"log_density_quantiles": {"levels": LEVELS, "values": "abc"}}, "no numbers"),
    "a list": ({"log_density_quantiles": [1, 2]}, "an entry that makes no sense"),
    "no values": ({"log_density_quantiles": {"levels": LEVELS}}, "lacks an entry"),
    "clusters as text": ({"clusters": "two"}, "an entry that makes no sense"),
    "no trees": ({"clusters": {"n_clusters": 2}}, "lacks an entry"),
    "no size": ({"files": {"model.safetensors": {"sha256": "0"}}}, "makes no sense"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CARDS.values(), ids=BAD_CARDS)
def test_a_card_that_describes_no_mixture_is_refused_in_one_line(
    changes: dict[str, Any], message: str, local: str, tmp_path: Path
) -> None:
    model = mixture()
    commit(local, model)
    alone = shutil.copytree(Path(local) / "model", tmp_path / "alone")
    place = refitted(alone, saved(model.parameters), **changes)
    with pytest.raises(UserError, match=rf"^{place}: [^\n]*{message}[^\n]*$"):
        load(place)


def test_no_tensors_at_all_are_refused_in_one_line(local: str, tmp_path: Path) -> None:
    commit(local)
    alone = shutil.copytree(Path(local) / "model", tmp_path / "alone")
    place = refitted(alone, b"no tensors")
    with pytest.raises(UserError, match=r"model\.safetensors is no such file \([^\n]*$"):
        load(place)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_rounding_is_no_fault_and_neither_are_empty_components(kind: str, local: str) -> None:
    """Weights of float32, covariances of products whose halves were rounded apart."""
    model = mixture(kind)
    part = model.parameters
    weights = doubles(0.0, 1 / 3, 2 / 3).float().double()
    covariances = part.covariances.clone()
    if part.type.has_products:
        covariances[..., 0, 1] *= 1 + 1e-9
    model = replace(model, parameters=replace(part, weights=weights, covariances=covariances))
    levels = Quantiles((0.0, 0.5, 0.75, 1.0), (math.nan, 1.0, 1.0 - 1e-15, 2.0))
    commit(local, replace(model, log_density_quantiles=levels, ids=(7, 0, 3)))
    loaded = load(local)
    assert same(loaded, model)
    assert loaded.ids == (7, 0, 3)
    assert loaded.log_density_quantiles is not None
    assert loaded.log_density_quantiles.at(0.5) == 1.0
    with pytest.raises(UserError, match=r"quantile at 0\.1 is not known"):
        loaded.log_density_quantiles.at(0.1)


# ------------------------------------------------------------------------- the race


RACER = textwrap.dedent("""
    import glob, sys, threading
    from pathlib import Path
    root = sys.argv[1]
    sys.path[:0] = [root, root + "/tests", *glob.glob(root + "/tests/*/")]
    from test_commit import PROVENANCE, claim, UserError, race_model

    url, first, lock = sys.argv[2], int(sys.argv[3]), threading.Lock()
    claimed, go = threading.Barrier(6), threading.Event()

    def run(number):
        try:
            with claim(url) as attempt:
                attempt.write_model(race_model(number), PROVENANCE)
                attempt.write_json("sweep.json", {"number": number})
                claimed.wait()
                go.wait()
                attempt.commit()
                outcome = f"won {number}"
        except UserError as error:
            outcome = f"lost {number} {error}"
        with lock:
            print(outcome, flush=True)

    threads = [threading.Thread(target=run, args=[first + i]) for i in range(5)]
    [thread.start() for thread in threads]
    claimed.wait()
    print("ready", flush=True)
    sys.stdin.readline()
    go.set()
    [thread.join() for thread in threads]
""")


def race_model(number: int) -> Mixture:
    """A model all of whose parts tell whose it is."""
    value = torch.full((2, 64), float(number), dtype=torch.float64)
    weights = torch.full((2,), 0.5, dtype=torch.float64)
    parameters = Parameters(
        weights=weights, means=value, covariances=value + 1, covariance_type="diag"
    )
    names = tuple(f"x{j}" for j in range(64))
    return Mixture(
        parameters=parameters, feature_names=names, log_likelihood=float(number), n_samples=1.0
    )


def number_of(model: Mixture) -> int:
    part = model.parameters
    parts = (part.means, part.covariances - 1)
    numbers = {int(value) for tensor in parts for value in tensor.unique()}
    assert numbers == {int(model.log_likelihood)}
    return numbers.pop()


def read_once(url: str) -> int | None:
    try:
        number = number_of(load(url))
    except UserError as error:
        if "unfinished attempts" in str(error):
            return None
        raise
    assert read_report(url) == {"number": number}
    return number


@contextmanager
def racing(url: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Run four processes of five attempts each, all of them about to commit."""
    root = str(Path(__file__).parents[2])
    with ExitStack() as stack:
        racers = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", RACER, root, url, str(5 * i)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for i in range(4)
        ]
        for racer in racers:
            stack.callback(racer.kill)
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        yield racers


@pytest.mark.parametrize("out", ["local", "s3"], indirect=True)
def test_of_twenty_commits_at_once_one_wins(out: str) -> None:
    with racing(out) as racers:
        seen = {read_once(out)}
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        while any(racer.poll() is None for racer in racers):
            seen.add(read_once(out))
        outcomes = [line for racer in racers for line in racer.communicate()[0].splitlines()]
    assert [racer.returncode for racer in racers] == [0] * 4
    won = [int(line.split()[1]) for line in outcomes if line.startswith("won")]
    assert len(outcomes) == 20
    assert len(won) == 1
    assert seen <= {None, won[0]}
    assert read_once(out) == won[0]
    winner = read_json(f"{out}/manifest.json")["attempt"]
    assert attempts(out) == {winner}
    assert all(winner in line for line in outcomes if line.startswith("lost"))
