"""Classes of converted models for SGLang, which imports every module in here when it first asks for a class."""
