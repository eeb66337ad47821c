#!/bin/sh
# A classifier of pictures in folders, on the command line: train, compress to half of the multiply-adds, ship.
#
# pip install '.[models,data,onnx]'
# sh examples/classifier.sh PICTURES resnet18 60        PICTURES/train/CLASS/*.jpg and PICTURES/val/CLASS/*.jpg
set -eu
pictures=$1
model=${2:-resnet18}
epochs=${3:-60}

# The dense network first: a trained one is compressed better than a fresh one, and teaches the small one.
espalier compress --model "$model" --data "imagefolder:$pictures" --mean measured --std measured \
    --method none --epochs "$epochs" --batch-size 32 --out runs/dense
espalier compress --model "$model" --weights runs/dense/model.safetensors \
    --data "imagefolder:$pictures" --mean measured --std measured \
    --method tcp --macs 0.5 --epochs "$epochs" --batch-size 32 --out runs/half
espalier evaluate runs/half
espalier export runs/half --to small.onnx --input-name image --output-name logits
espalier time "$model" runs/half small.onnx
