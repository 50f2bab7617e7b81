"""Paired runs that isolate the effect of one choice: variants share recipe and seeds, and differ in one setting.

An experiment is a grid, a YAML file (:mod:`.grid`). Its runs are ordinary runs of `ubn_zoo.training.run`, trained by
any number of processes (:mod:`.runs`). Their measurements are collected into CSV files (:mod:`.tables`), from which the
page and its figures are made (:mod:`.report`), with paired statistics (:mod:`.inference`).
"""
