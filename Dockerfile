# For a machine with an NVIDIA driver; never built or run so far. docker build -t carft_fast .
# docker run --gpus all --ipc=host -v $PWD/runs:/app/runs carft_fast carft-fast quickstart
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends g++ make git && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY . .
RUN pip install --no-cache-dir ".[vllm,deepspeed]"
ENTRYPOINT []
CMD ["carft-fast", "--help"]
