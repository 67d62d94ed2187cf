"""Which fault explains a wrong product, or wrong stored codes and scales? (docs/diagnosis.md)"""
