"""The examples for clusters stay runnable: shell syntax, manifest shape, and options that the command really has."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import yaml

from llmcompress.recipe.catalog import shipped_path
from llmcompress.recipe.load import load_recipe

FOLDER = Path(__file__).resolve().parents[3] / "docs" / "cluster"


def options(command: str) -> set[str]:
    import typer

    from llmcompress.cli.app import app

    group: Any = typer.main.get_command(app)
    return {name for parameter in group.commands[command].params for name in parameter.opts}


def check_command(words: list[str]) -> None:
    """A command line of ours: recipe, overrides and options exist."""
    assert words[:2] == ["llmcompress", "run"]
    assert shipped_path(words[2]) is not None
    overrides = [word for word in words[3:] if re.match(r"[a-z.]+=", word)]
    load_recipe(words[2], overrides)
    given = {word for word in words if word.startswith("--")}
    assert given <= options("run")
    assert {"--nproc", "--nnodes", "--rdzv-endpoint", "--rdzv-id"} <= given


def test_slurm_script() -> None:
    path = FOLDER / "slurm.sbatch"
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.MULTILINE))
    assert directives["ntasks-per-node"] == "1"
    # every directive comes before the first command, where sbatch still reads them
    assert text.rindex("#SBATCH") < text.index("set -euo")
    command = text[text.index("llmcompress run eac_moe_mixtral") :].replace("\\\n", " ")
    check_command(shlex.split(command))


def test_kubernetes_job() -> None:
    service, job = yaml.safe_load_all((FOLDER / "kubernetes-job.yaml").read_text())
    assert (service["kind"], job["kind"], job["apiVersion"]) == ("Service", "Job", "batch/v1")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    words = pod["containers"][0]["command"]
    check_command(words)
    value = {word: words[n + 1] for n, word in enumerate(words) if word.startswith("--")}
    assert spec["completionMode"] == "Indexed"
    assert int(value["--nnodes"]) == spec["completions"] == spec["parallelism"]
    assert pod["restartPolicy"] in ("Never", "OnFailure")
    host, port = value["--rdzv-endpoint"].split(":")
    assert host == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert int(port) == service["spec"]["ports"][0]["port"]
    claimed = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert claimed == {volume["name"] for volume in pod["volumes"]}


def test_dockerfile() -> None:
    text = re.sub(r"^#.*\n", "", (FOLDER / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line.partition(" ")[::2] for line in text.splitlines()]
    assert lines[0][0] == "FROM" and {word for word, _ in lines} <= {
        "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "EXPOSE", "HEALTHCHECK", "CMD"
    }  # fmt: skip
    copied = [name for word, rest in lines if word == "COPY" for name in rest.split()[:-1]]
    root = FOLDER.parents[1]
    assert all((root / name).exists() for name in copied)
    # all that the wheel is made of, links to recipes included
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert {"llmcompress", "kernels", "recipes", "pyproject.toml", project["project"]["readme"]} <= set(copied)
    for _, rest in (line for line in lines if line[0] == "RUN"):
        subprocess.run(["bash", "-n", "-c", rest], check=True)
    assert any(f"{pin} " in rest for _, rest in lines for pin in re.findall(r"torch==\S+", read_makefile(root)))
    words = json.loads(lines[-1][1])
    assert words[:2] == ["llmcompress", "serve"]
    assert {word for word in words if word.startswith("--")} <= options("serve")


def read_makefile(root: Path) -> str:
    return (root / "Makefile").read_text()


def test_constraints_leave_alone_what_comes_with_torch() -> None:
    """The builds of torch for GPUs need exact versions of these, each its own; a pin of ours would stop pip."""
    lines = (FOLDER.parents[1] / "constraints.txt").read_text().splitlines()
    names = {line.partition("==")[0].lower() for line in lines if not line.startswith("#")}
    assert len(names) > 90
    assert not [name for name in names if name in ("torch", "triton") or name.startswith(("nvidia", "cuda"))]
