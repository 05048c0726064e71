# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import InvalidInput
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import names


@pytest.mark.parametrize("name", ["a", "before-upgrade", "2026-11-21", "A.b_c+d@e=f", "x" * 100])
def test_safe_names(name):
    assert names.check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "-a", "a/b", "a b", "a\n", "a\0", "ä", "x" * 101, "a;b", "$(a)"])
def test_unsafe_names(name):
    with pytest.raises(InvalidInput, match="not a safe name"):
        names.check_name(name)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("1.5 m", 90), ("2h", 7200), ("1d", 86400), ("1w", 604800), ("500ms", 0.5), (7, 7)],
)
def test_durations(text, seconds):
    assert names.parse_duration(text, "deadline") == seconds


@pytest.mark.parametrize("text", ["", "-1", "1y", "s", "1e3", "nan", "inf", "1 2"])
def test_what_is_no_duration(text):
    with pytest.raises(InvalidInput, match="is not a duration"):
        names.parse_duration(text, "deadline")


@pytest.mark.parametrize(
    ("text", "size"),
    [("4G", 4 << 30), ("512MiB", 512 << 20), ("1.5k", 1536), ("100", 100), (100, 100), ("1TB", 1 << 40), ("7B", 7)],
)
def test_sizes(text, size):
    if text == "7B":
        with pytest.raises(InvalidInput):
            names.parse_size("B7", "size")
    assert names.parse_size(text, "size") == size


@pytest.mark.parametrize(
    ("value", "tags"),
    [
        (None, None),
        ("", None),
        ({}, {}),
        ('{"a": "b"}', {"a": "b"}),
        ({"a": 1, "b": True, "c": 1.5}, {"a": "1", "b": "true", "c": "1.5"}),
    ],
)
def test_tags(value, tags):
    assert names.check_tags(value) == tags


@pytest.mark.parametrize(
    "value", ["a=b", "[1]", "7", {"a": {}}, {"a": ["b"]}, {"a b": "c"}, {"a": "\x00"}, {"a": "x" * 1025}]
)
def test_what_is_no_tags(value):
    with pytest.raises(InvalidInput):
        names.check_tags(value)


def test_text_that_xml_cannot_hold_is_refused():
    assert names.check_text("tab\tline\nümlaut 😀", "description")
    for text in ("\x00", "\x1b", "\ufffe", "x" * 4097):
        with pytest.raises(InvalidInput):
            names.check_text(text, "description")


def test_a_file_name_tells_what_it_belongs_to():
    assert names.file_stem("web01", "vda", "before-upgrade") == "web01.vda.before-upgrade"


def test_different_names_never_share_a_file_and_no_file_name_is_dangerous():
    odd = ["a/b", "a_b", "../a", ".a", "-a", "a b", "ä", "\udcff", "x" * 300, "x" * 301, "a:b"]
    stems = [names.file_stem(name, "vda") for name in odd]
    assert len(set(stems)) == len(odd)
    for stem in stems:
        assert "/" not in stem
        assert stem[0] not in ".-"
        assert len(os.fsencode(stem + ".qcow2")) < 255


def test_a_directory_must_exist_and_be_absolute(tmp_path):
    os.symlink(tmp_path, tmp_path / "link")
    assert names.check_directory(str(tmp_path / "link")) == os.path.realpath(tmp_path)
    (tmp_path / "file").touch()
    for wrong in ("relative", str(tmp_path / "gone"), str(tmp_path / "file")):
        with pytest.raises(InvalidInput):
            names.check_directory(wrong)
