"""Recipes: what loads, what is refused and how, and that a resolved run survives JSON."""

import json
import sys
from pathlib import Path

import pytest

from copd_megatron.config.loading import apply_overrides, load_config, load_recipe, to_json
from copd_megatron.config.reference import resolve_object
from copd_megatron.config.run import RunConfig
from copd_megatron.types import Edge, UserError

HEAD = """
from copd_megatron.config.losses import RlvrConfig
from copd_megatron.config.model import ModelConfig
from copd_megatron.config.run import RunConfig
from copd_megatron.config.tasks import ExpertConfig
"""
MINIMAL = (
    HEAD
    + """
def recipe():
    return RunConfig(model=ModelConfig(path="backbone"), experts={"text": ExpertConfig(task="tasks:Text")})
"""
)


@pytest.fixture(autouse=True)
def untouched_imports():
    """Recipes change what is importable; every test starts from the same state."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if not name.startswith("copd_"):
            del sys.modules[name]


def write(folder: Path, text: str, name: str = "a_recipe.py") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def test_recipe_returns_its_run_with_paths_from_its_folder(tmp_path):
    config = load_recipe(write(tmp_path, MINIMAL))
    assert isinstance(config, RunConfig)
    assert config.model.path == str(tmp_path / "backbone")
    assert config.rlvr.kl_reference == "backbone"


def test_frozen_reference_adapter_is_found_beside_the_recipe(tmp_path):
    text = MINIMAL.replace(
        "model=ModelConfig", 'rlvr=RlvrConfig(kl_reference="../adapter"), model=ModelConfig'
    )
    assert load_recipe(write(tmp_path, text)).rlvr.kl_reference == str(tmp_path.parent / "adapter")


def test_frozen_teachers_are_found_beside_the_recipe_or_where_the_command_is_given(tmp_path, monkeypatch):
    text = MINIMAL.replace(
        "model=ModelConfig", 'exchange={"frozen_teachers": {"old": "../adapter"}}, model=ModelConfig'
    )
    config = load_recipe(write(tmp_path, text))
    assert config.exchange.frozen_teachers == {"old": str(tmp_path.parent / "adapter")}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    changed = apply_overrides(config, ["exchange.frozen_teachers.new=there", "seed=3"])
    assert changed.exchange.frozen_teachers == {
        "old": str(tmp_path.parent / "adapter"), "new": str(tmp_path / "here" / "there")
    }


def test_what_an_expert_begins_as_is_found_beside_the_recipe_or_where_the_command_is_given(tmp_path, monkeypatch):
    text = MINIMAL.replace('task="tasks:Text"', 'task="tasks:Text", init_from="../adapter"')
    config = load_recipe(write(tmp_path, text))
    assert config.experts["text"].init_from == str(tmp_path.parent / "adapter")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert apply_overrides(config, ["seed=3"]).experts["text"].init_from == str(tmp_path.parent / "adapter")
    changed = apply_overrides(config, ["experts.text.init_from=there"])
    assert changed.experts["text"].init_from == str(tmp_path / "here" / "there")
    assert apply_overrides(config, ["experts.text.init_from=null"]).experts["text"].init_from is None


def test_absolute_model_path_stays(tmp_path):
    config = load_recipe(write(tmp_path, MINIMAL.replace('"backbone"', '"/data/backbone"')))
    assert config.model.path == "/data/backbone"


def test_recipe_imports_its_neighbours_and_packages_outside_the_repo(tmp_path):
    (tmp_path / "my_lab").mkdir()
    write(tmp_path / "my_lab", "", "__init__.py")
    write(tmp_path / "my_lab", "class Task:\n    pass\n", "puzzles.py")
    text = HEAD + "from my_lab.puzzles import Task\n" + MINIMAL.replace('"tasks:Text"', "Task")
    config = load_recipe(write(tmp_path, text))
    assert config.experts["text"].task.__name__ == "Task"
    assert resolve_object("my_lab.puzzles:Task") is config.experts["text"].task


def test_a_recipe_may_take_the_place_of_another_of_the_same_name(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        config = load_recipe(write(tmp_path / folder, MINIMAL))
        assert config.model.path == str(tmp_path / folder / "backbone")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", r"has no function recipe\(\)"),
        ("def recipe():\n    return 3\n", r"returned int; it must return a RunConfig"),
        ("def recipe():\n    return 1 / 0\n", r"a_recipe\.py:2: ZeroDivisionError"),
        ("import no_such_package\n", r"a_recipe\.py:1: ModuleNotFoundError: .*no_such_package"),
        ("def recipe(:\n", r"a_recipe\.py:1: SyntaxError"),
        ("def recipe(seed):\n    return seed\n", r"a_recipe\.py: TypeError: .*seed"),
        (MINIMAL.replace("path=", "pth="), r"^model\.pth: no such key; nearest: model\.path"),
        (
            MINIMAL.replace('path="backbone"', ""),
            r"^model\.path: not given; required; set it: Local Hugging Face directory",
        ),
        (
            MINIMAL.replace("model=", "rlvr=RlvrConfig(clip_hi=0.3), model="),
            r"^rlvr\.clip_hi: no such key; nearest: rlvr\.clip_high",
        ),
        (
            MINIMAL.replace("task=", "tusk="),
            r"^experts\.<name>\.tusk: no such key; nearest: experts\.<name>\.task",
        ),
        (MINIMAL.replace("experts={", "experts={}, no={"), r"^no: no such key"),
        (
            MINIMAL.replace("experts={", "seed='x', experts={"),
            r"^seed: 'x' given; allowed: int; the default is 0",
        ),
        (
            MINIMAL.replace("path=", "dtype='fp8', path="),
            r'^model\.dtype: \'fp8\' given; allowed: "float32" \| "bfloat16"',
        ),
    ],
)
def test_what_is_wrong_with_a_recipe_is_said_in_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_error_below_the_recipe_names_the_line_in_the_recipe(tmp_path):
    with pytest.raises(UserError, match=r"a_recipe\.py:3: JSONDecodeError"):
        load_recipe(write(tmp_path, "import json\ndef recipe():\n    return json.loads('{')\n"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("absent.py", "does not exist"), ("folder", "is a folder"), ("notes.txt", "is no Python file")],
)
def test_what_is_no_recipe_file(tmp_path, name, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=reason):
        load_recipe(tmp_path / name)


@pytest.mark.parametrize("name", ["random.py", "zipapp.py", "pydantic.py", "v1.2.py"])
def test_recipe_may_not_hide_a_module(tmp_path, name):
    with pytest.raises(UserError, match="rename the file"):
        load_recipe(write(tmp_path, MINIMAL, name))
    assert str(tmp_path) not in sys.path


def test_json_names_functions_and_reads_back_equal(tmp_path):
    write(tmp_path, "def topology(experts, opd_step):\n    return []\n", "edges.py")
    text = "from edges import topology\n" + MINIMAL.replace(
        "model=", 'exchange={"topology": topology}, model='
    )
    config = load_recipe(write(tmp_path, text))
    tree = json.loads(to_json(config))
    assert tree["exchange"]["topology"] == "edges:topology"
    assert tree["optimizer"]["betas"] == [0.9, 0.999]
    write(tmp_path, to_json(config), "config.json")
    again = load_config(tmp_path / "config.json")
    assert to_json(again) == to_json(config)
    assert resolve_object(again.exchange.topology) is config.exchange.topology


def test_json_holds_every_section_and_field(tmp_path):
    config = load_recipe(write(tmp_path, MINIMAL))
    tree = json.loads(to_json(config))
    assert list(tree) == list(RunConfig.model_fields)
    assert list(tree["rlvr"]) == list(type(config.rlvr).model_fields)


def test_edges_are_written_as_edges(tmp_path):
    config = load_recipe(write(tmp_path, MINIMAL))
    config.exchange.topology = [Edge("text", "text", beta=0.5)]
    assert json.loads(to_json(config))["exchange"]["topology"] == [
        {"teacher": "text", "student": "text", "beta": 0.5, "signal": "sampled", "prompts": None}
    ]


def test_object_without_a_name_is_readable_but_not_loadable(tmp_path):
    text = "class Puzzle:\n    pass\n" + MINIMAL.replace('"tasks:Text"', "Puzzle()")
    written = to_json(load_recipe(write(tmp_path, text)))
    assert json.loads(written)["experts"]["text"]["task"] == "<a_recipe:Puzzle object>"
    write(tmp_path, written, "config.json")
    with pytest.raises(UserError, match=r"experts\.text\.task: .*name the recipe instead"):
        load_config(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), ("{", "is no JSON"), ('{"seeed": 1}', "seeed|model")]
)
def test_damaged_config_json(tmp_path, content, message):
    if content is not None:
        write(tmp_path, content, "config.json")
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "config.json")


def test_names_resolve_also_dotted():
    assert resolve_object("copd_megatron.types:Edge") is Edge
    assert resolve_object("copd_megatron.types:Edge.__init__") is Edge.__init__


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("copd_megatron.types", "allowed is 'pkg.module:Name'"),
        (":Edge", "allowed is 'pkg.module:Name'"),
        ("copd_megatron.typos:Edge", r"no module 'copd_megatron\.typos'"),
        ("copd_megatron.types:Egde", r"has no 'Egde', it has .*'Edge'"),
    ],
)
def test_names_that_do_not_resolve(name, message):
    with pytest.raises(UserError, match=message) as caught:
        resolve_object(name, "experts.text.task")
    assert str(caught.value).startswith("experts.text.task: ")


def test_module_that_fails_at_import(tmp_path, monkeypatch):
    write(tmp_path, "raise RuntimeError('no luck')\n", "failing_module.py")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="importing it failed with RuntimeError: no luck"):
        resolve_object("failing_module:Name")
