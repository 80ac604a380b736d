"""The cluster launcher's file is one that Ray and EC2 accept, with the four pools and with authentication on."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

Config = dict[str, Any]


@pytest.fixture()
def config(repository: Path) -> Config:
    """The file as it is written."""
    document = yaml.safe_load((repository / "ray-cluster.yaml").read_text())
    assert isinstance(document, dict)
    return document


@pytest.fixture(scope="module")
def instance_shape() -> Any:
    """EC2's own description of a request for instances, from botocore's data; no network."""
    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def test_the_launcher_accepts_the_file(config: Config) -> None:
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == set(config["available_node_types"])


def _unknown_key(config: Config) -> None:
    config["available_node_types"]["cpu"]["instances"] = 3


def _unknown_head(config: Config) -> None:
    config["head_node_type"] = "absent"


def _fewer_than_the_minimum(config: Config) -> None:
    config["max_workers"] = 0


def _negative_resource(config: Config) -> None:
    config["available_node_types"]["gpu-train"]["resources"]["GPU"] = -1


@pytest.mark.parametrize("spoil", [_unknown_key, _unknown_head, _fewer_than_the_minimum, _negative_resource])
def test_the_launcher_refuses_a_spoiled_file(config: Config, spoil: Callable[[Config], None]) -> None:
    spoil(config)
    with pytest.raises((ValueError, ValidationError)):
        validate_config(prepare_config(config))


def test_every_node_is_a_request_that_ec2_understands(config: Config, instance_shape: Any) -> None:
    validator = botocore.validate.ParamValidator()
    known = instance_shape.members["InstanceType"].enum
    for name, node in config["available_node_types"].items():
        request = {**node["node_config"], "MinCount": 1, "MaxCount": 1}
        report = validator.validate(request, instance_shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
        assert node["node_config"]["InstanceType"] in known, name


def test_there_is_a_head_a_cpu_pool_and_a_gpu_pool_for_each_work(config: Config) -> None:
    pools = config["available_node_types"]
    assert set(pools) == {config["head_node_type"], "cpu", "gpu-train", "gpu-serve"}
    assert pools[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert "GPU" not in pools["cpu"]["resources"]
    assert pools["gpu-train"]["resources"]["GPU"] >= 1 and pools["gpu-serve"]["resources"]["GPU"] >= 1
    assert all(node["labels"] == {"pool": name} for name, node in pools.items())
    assert all(node.get("min_workers", 0) <= node.get("max_workers", 0) for node in pools.values())
    assert sum(node.get("max_workers", 0) for node in pools.values()) <= config["max_workers"]


def test_nodes_start_with_tokens_in_the_repository_and_the_dashboard_stays_on_loopback(config: Config) -> None:
    setup = "\n".join(config["setup_commands"])
    assert "RAY_AUTH_MODE=token" in setup and "chmod 600" in setup and "RAY_AUTH_TOKEN_PATH" in setup
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    for command in (config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]):
        assert command.startswith("cd /home/ubuntu/diagonal &&")
