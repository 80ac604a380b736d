"""The cluster launcher's file is one that Ray and EC2 accept, closed to the internet, with its pools and tokens on."""

import copy
import importlib.resources
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import pytest
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.infra.manifests import load

Config = dict[str, Any]


@pytest.fixture()
def config(repository: Path) -> Config:
    """The file as it is written."""
    (document,) = load((repository / "ray-cluster.yaml").read_text())
    return document


@pytest.fixture(scope="module")
def instance_shape() -> Any:
    """EC2's own description of a request for instances, from botocore's data; no network."""
    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def check(config: Config, instance_shape: Any) -> list[str]:
    """The pools that were looked at; ValueError or ValidationError for what the launcher or EC2 would refuse, or Ray
    would silently overlook."""
    validate_config(prepare_config(copy.deepcopy(config)))
    schema = json.loads((importlib.resources.files("ray.autoscaler") / "ray-schema.json").read_text())
    unknown = set(config["provider"]) - set(schema["properties"]["provider"]["properties"])
    if unknown:
        raise ValueError(f"provider: {sorted(unknown)} mean nothing to Ray")
    for name, node in config["available_node_types"].items():
        faults = node_faults(node["node_config"], instance_shape)
        if faults:
            raise ValueError(f"{name}: {faults}")
    return list(config["available_node_types"])


def node_faults(node_config: Config, instance_shape: Any) -> list[str]:
    """What EC2 would refuse in a pool's request: keys, types, values of its own lists."""
    request = {**node_config, "MinCount": 1, "MaxCount": 1}
    request["SubnetId"] = request.pop("SubnetIds")[0]  # Ray's own key: it chooses one
    report = botocore.validate.ParamValidator().validate(request, instance_shape)
    return [report.generate_report()] if report.has_errors() else list(_outside(request, instance_shape))


def _outside(value: Any, shape: Any) -> Iterator[str]:
    """Values that are not in the list which their shape names; botocore leaves that to EC2."""
    if shape.type_name == "structure":
        for key, inner in value.items():
            yield from _outside(inner, shape.members[key])
    elif shape.type_name == "list":
        for inner in value:
            yield from _outside(inner, shape.member)
    elif getattr(shape, "enum", None) and value not in shape.enum:
        yield f"{shape.name} {value!r}"


def test_the_launcher_and_ec2_accept_the_file(config: Config, instance_shape: Any) -> None:
    assert len(check(config, instance_shape)) == 5, "the head and four pools, each held to EC2's own description"


def _pool(config: Config, name: str = "cpu") -> Config:
    found: Config = config["available_node_types"][name]
    return found


def _unknown_key(config: Config) -> None:
    config["worker_max"] = config.pop("max_workers")


def _unknown_key_of_a_pool(config: Config) -> None:
    _pool(config)["instances"] = 3


def _unknown_key_of_the_provider(config: Config) -> None:
    config["provider"]["use_internal_ip"] = config["provider"].pop("use_internal_ips")


def _unknown_key_of_ssh(config: Config) -> None:
    config["auth"]["ssh_usr"] = config["auth"].pop("ssh_user")


def _unknown_head(config: Config) -> None:
    config["head_node_type"] = "absent"


def _fewer_than_the_minimum(config: Config) -> None:
    config["max_workers"] = 0


def _negative_resource(config: Config) -> None:
    _pool(config, "gpu-train")["resources"]["GPU"] = -1


def _unknown_key_of_a_node(config: Config) -> None:
    _pool(config)["node_config"]["InstanceTypes"] = _pool(config)["node_config"].pop("InstanceType")


def _unknown_key_of_a_disk(config: Config) -> None:
    _pool(config)["node_config"]["BlockDeviceMappings"][0]["Ebs"]["Encryptd"] = True


def _wrong_type_of_a_disk(config: Config) -> None:
    _pool(config)["node_config"]["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] = "200 GB"


def _unknown_instance(config: Config) -> None:
    _pool(config, "gpu-serve")["node_config"]["InstanceType"] = "p5.5xlarge"


def _unknown_disk(config: Config) -> None:
    _pool(config)["node_config"]["BlockDeviceMappings"][0]["Ebs"]["VolumeType"] = "gp4"


def _unknown_market(config: Config) -> None:
    _pool(config, "cpu-spot")["node_config"]["InstanceMarketOptions"]["MarketType"] = "sopt"


@pytest.mark.parametrize(
    "spoil",
    [
        _unknown_key,
        _unknown_key_of_a_pool,
        _unknown_key_of_the_provider,
        _unknown_key_of_ssh,
        _unknown_head,
        _fewer_than_the_minimum,
        _negative_resource,
        _unknown_key_of_a_node,
        _unknown_key_of_a_disk,
        _unknown_disk,
        _wrong_type_of_a_disk,
        _unknown_instance,
        _unknown_market,
    ],
)
def test_a_spoiled_file_is_refused(config: Config, instance_shape: Any, spoil: Callable[[Config], None]) -> None:
    spoil(config)
    with pytest.raises((ValueError, ValidationError)):
        check(config, instance_shape)


def test_there_is_a_head_a_cpu_pool_and_a_gpu_pool_for_each_work(config: Config) -> None:
    pools = config["available_node_types"]
    assert set(pools) == {config["head_node_type"], "cpu", "cpu-spot", "gpu-train", "gpu-serve"}
    assert pools[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert {name for name, node in pools.items() if "GPU" in node["resources"]} == {"gpu-train", "gpu-serve"}
    assert all(node["labels"] == {"pool": name} for name, node in pools.items())
    assert all(node.get("min_workers", 0) <= node.get("max_workers", 0) for node in pools.values())
    assert sum(node.get("max_workers", 0) for node in pools.values()) == config["max_workers"]


def test_only_what_can_be_computed_again_is_on_spot(config: Config) -> None:
    markets = {
        name: node["node_config"].get("InstanceMarketOptions", {}).get("MarketType")
        for name, node in config["available_node_types"].items()
    }
    assert {name for name, market in markets.items() if market} == {"cpu-spot"}


def test_nothing_listens_to_the_internet_and_disks_are_encrypted(config: Config) -> None:
    """Without a group of ours Ray makes one that lets everybody reach port 22."""
    assert config["provider"]["use_internal_ips"] is True and "security_group" not in config["provider"]
    assert config["auth"]["ssh_proxy_use_node_id"] and "ssm start-session" in config["auth"]["ssh_proxy_command"]
    assert config["provider"]["region"] in config["auth"]["ssh_proxy_command"]
    for name, node in config["available_node_types"].items():
        request = node["node_config"]
        assert request["SecurityGroupIds"] and request["SubnetIds"] and "NetworkInterfaces" not in request, name
        assert all(disk["Ebs"]["Encrypted"] for disk in request["BlockDeviceMappings"]), name
        assert request["MetadataOptions"]["HttpTokens"] == "required", name
        assert request["IamInstanceProfile"]["Name"] == ("diagonal-head" if name == "head" else "diagonal-worker")


def test_nodes_start_with_tokens_in_the_repository_and_the_dashboard_stays_on_loopback(config: Config) -> None:
    setup = "\n".join(config["setup_commands"])
    assert "RAY_AUTH_MODE=token" in setup and "chmod 600" in setup and "RAY_AUTH_TOKEN_PATH" in setup
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    for command in (config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]):
        assert command.startswith("cd /home/ubuntu/diagonal &&")


def test_commands_name_what_is_there(repository: Path, config: Config) -> None:
    """What is mounted exists, make has the target, the interpreter is a supported one, options are Ray's own."""
    sources = [Path(source) for source in config["file_mounts"].values()]
    assert all((repository / source).is_dir() for source in sources if not str(source).startswith("~"))
    (make,) = (shlex.split(one) for one in config["setup_commands"] if one.startswith("make "))
    assert f"\n{make[3]}:" in (repository / "Makefile").read_text()
    (python,) = (word.partition("=")[2] for word in make if word.startswith("PYTHON="))
    (install,) = (one for one in config["setup_commands"] if "apt-get install" in one)
    assert python in ("python3.11", "python3.12") and f"{python}-venv" in install
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    for command in (config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]):
        given = {word.partition("=")[0] for word in shlex.split(command) if word.startswith("--")}
        assert given and given <= known, given - known
