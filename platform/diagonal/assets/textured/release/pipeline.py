from diagonal.pipeline import DiagonalPipeline as DiagonalPipeline
