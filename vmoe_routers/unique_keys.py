"""UniqueKeys: YAML's safe loader, which refuses a key that a mapping has twice."""

from __future__ import annotations

from typing import Any

import yaml
from yaml.constructor import ConstructorError


class UniqueKeys(yaml.SafeLoader):
    """Loader for ``yaml.load`` that raises a ConstructorError, a YAMLError, for a key that a mapping has twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Reads a mapping. Keys of other mappings, which "<<" names, are merged later."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return node
