# Copyright: vmkeeper.libvirt contributors
# SPDX-License-Identifier: GPL-3.0-or-later

stages := .venv/bin/python scripts/stages.py
in_copy := .venv/bin/python scripts/in_copy.py

.DEFAULT_GOAL := help
.PHONY: help bootstrap demo test test-long test-nested lint sanity units integration docs build importer clean

help:  ## show this
	@sed -n 's/^\([a-z-]*\):.*##/\1 #/p' Makefile | awk -F' # ' '{printf "  make %-12s %s\n", $$1, $$2}'

bootstrap:  ## install what is missing: Debian packages (as root) and .venv
	@scripts/bootstrap

demo: bootstrap  ## a real guest: snapshot, disaster, revert, flat chain, backup, restore, and the proof; removes what it made
	@tests/lab/enter --name demo -- .venv/bin/python tests/demo/run.py

test: bootstrap  ## all that CI runs: lint, sanity, units, integration, and the quick part of test-nested
	@$(stages) lint sanity units integration nested-quick

test-long: export VMK_SCALE ?= 20
test-long: test  ## the same with the randomised tests VMK_SCALE (20) times as large

test-nested: bootstrap  ## roles and AppArmor in whole Debian machines with libvirt inside; newer libvirt and QEMU; docs/generations.md
	@$(stages) generations nested; status=$$?; .venv/bin/python tests/generations/table.py && exit $$status

lint: bootstrap  ## style, types, documentation, change log
	@$(stages) lint

sanity: bootstrap  ## ansible-test sanity; the artifact through Galaxy's importer
	@$(stages) sanity

units: bootstrap  ## unit tests, by pytest and by ansible-test
	@$(stages) units

integration: bootstrap  ## tests on real guests; TRADE=snapshots runs one directory, PYTEST_ARGS goes to pytest
	@$(stages) integration

docs: bootstrap  ## check the documentation alone
	@.venv/bin/antsibull-docs lint-collection-docs --plugin-docs --validate-collection-refs=all .

build: bootstrap  ## build/vmkeeper-libvirt-VERSION.tar.gz from what git knows
	@rm -rf build && mkdir build
	@$(in_copy) ansible-galaxy collection build --output-path $(CURDIR)/build

# The importer insists on a repository's address, which galaxy.yml does not have yet: it gets a stand-in.
importer: bootstrap  ## run Galaxy's importer on an artifact
	@rm -rf .cache/importer && mkdir -p .cache/importer
	@$(in_copy) sh -ec 'grep -q ^repository: galaxy.yml || echo "repository: https://example.com/" >>galaxy.yml; \
		ansible-galaxy collection build --output-path $(CURDIR)/.cache/importer; \
		cd $(CURDIR)/.cache/importer; \
		GALAXY_IMPORTER_CHECK_REQUIRED_TAGS=true LC_ALL=C.UTF-8 python -m galaxy_importer.main *.tar.gz'

clean:  ## remove all that was made here but .venv
	rm -rf .cache build tests/output
