#!/bin/sh
# The image's entry point: options alone are those of `serve`; anything else is a command.
case ${1:--} in
  -*) ;;
  *) exec "$@" ;;
esac

# With a model in the words of Text Embeddings Inference, the port that its image listens on is open too, if no option
# names an address and the container may: its compose files and charts publish port 80.
case "${MODEL_ID:+ --model-id} $*" in
  *' --port'* | *' --host'*) named=yes ;;
  *' --model-id'*) named=$PORT$AIP_HTTP_PORT$GUNICORN_CMD_ARGS ;;
  *) named=yes ;;
esac
host=${HOST:-0.0.0.0}
if [ -z "$named" ] && python -c 'import socket, sys; socket.create_server((sys.argv[1], 80))' "$host" 2>/dev/null; then
  export GUNICORN_CMD_ARGS="--bind $host:8001 --bind $host:80"
fi
exec python app.py "$@"
