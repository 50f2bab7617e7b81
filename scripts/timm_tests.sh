#!/usr/bin/env bash
# Runs timm's own model tests on UBN twins. The tests come from the source distribution of the installed timm version.
#
#   bash scripts/timm_tests.sh                 a sample of families, a few minutes
#   bash scripts/timm_tests.sh resnet50_ubn    twins whose names contain this text
# Tests that download pretrained weights are skipped.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
use_venv test
if [ "$#" -eq 0 ]; then
    set -- resnet10t_ubn resnet26t_ubn regnetx_002_ubn mobilenetv3_small_050_ubn efficientnet_lite0_ubn lcnet_050_ubn \
        mobileone_s0_ubn repvgg_a0_ubn dpn48b_ubn densenet121_ubn vgg11_bn_ubn fastvit_t8_ubn
fi
python=$UBN_VENV/bin/python
version=$("$python" -c 'import timm; print(timm.__version__)')
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary timm \
    --dest "$folder" "timm==$version"
tar -xzf "$folder/timm-$version.tar.gz" -C "$folder"
chosen=$(printf ' or %s' "$@")
cd "$folder/timm-$version"
# The plugin registers UBN before timm's tests list the models. Remove the source tree's timm to test the installed one.
rm -rf timm
HF_HUB_OFFLINE=1 "$python" -m pytest -q -c /dev/null --rootdir . -p no:cacheprovider -p ubn_zoo -W ignore \
    tests/test_models.py -k "(${chosen# or }) and not pretrained"
