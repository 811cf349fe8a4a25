"""Factorisation: sizes, RoPE selection and the joint SVD."""
