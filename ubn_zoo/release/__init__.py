"""What makes checkpoints public: conversion, verification, bundled weights, model cards and uploads."""
