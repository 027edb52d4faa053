"""The YAML loader that refuses keys that a mapping has twice."""

import pytest
import yaml

from vmoe_routers.unique_keys import UniqueKeys


def test_merged_keys_may_be_given_again():
    text = "a: &a {x: 1}\nb: &b {<<: *a, x: 2}\n<<: *b\n"
    assert yaml.load(text, UniqueKeys) == yaml.safe_load(text)


@pytest.mark.parametrize("text", ["x: 1\nx: 2", "a: {b: {x: 1, x: 1}}", "- {x: 1, y: 2, x: 3}", "{<<: {x: 1, x: 2}}"])
def test_a_key_given_twice_is_refused(text):
    with pytest.raises(yaml.constructor.ConstructorError, match="x is given twice"):
        yaml.load(text, UniqueKeys)


@pytest.mark.parametrize("text", ["a: !!map [1, 2]", "a: !!map b", "{[1]: 2}"])
def test_other_faults_are_errors_of_yaml(text):
    with pytest.raises(yaml.YAMLError):
        yaml.load(text, UniqueKeys)
