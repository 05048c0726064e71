# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest

from ansible_collections.vmkeeper.libvirt.tests.docs_examples import (
    DocumentationError,
    Example,
    examples_in,
    examples_of,
)

PAGE = """\
# Snapshots

```console
$ not marked, so not an example
```

<!-- example: take-one -->
```yaml
- name: Take a snapshot
  vmkeeper.libvirt.snapshot:
```

1. In a list:

   <!-- example: look -->
   ~~~console
   $ virsh list
     indented
   ~~~
"""


def test_marked_blocks_are_found_with_language_text_and_line(tmp_path):
    (tmp_path / "page.md").write_text(PAGE, encoding="utf-8")
    assert examples_in(tmp_path / "page.md") == [
        Example("take-one", "yaml", "- name: Take a snapshot\n  vmkeeper.libvirt.snapshot:\n", 9),
        Example("look", "console", "$ virsh list\n  indented\n", 17),
    ]


def test_a_marker_shown_inside_a_block_is_text():
    page = "<!-- example: outer -->\n````md\n<!-- example: inner -->\n```yaml\na: 1\n```\n````\n"
    assert [(e.name, e.text.count("\n")) for e in examples_of(page, "page.md")] == [("outer", 4)]


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- example: lost -->\n\n```yaml\na: 1\n```\n", "page.md:2: no code block follows the marker"),
        ("<!-- example: lost -->\n", "page.md:1: no code block follows the marker"),
        ("<!-- example: a -->\n<!-- example: b -->\n```\n```\n", "page.md:2: no code block follows"),
        ("<!-- example: Bad Name -->\n```\n```\n", "page.md:1: 'Bad Name' is no name"),
        ("<!-- example: open -->\n```yaml\na: 1\n", "page.md:2: this code block has no end"),
        ("```yaml\nnot even marked\n", "page.md:1: this code block has no end"),
        ("<!-- example: x -->\n```\n```\n<!-- example: x -->\n```\n```\n", "'x' is at line 3 already"),
    ],
)
def test_an_example_that_would_go_untested_is_refused(page, message):
    with pytest.raises(DocumentationError) as error:
        examples_of(page, "page.md")
    assert message in str(error.value)
