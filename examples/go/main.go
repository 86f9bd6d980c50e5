// Spawn starts a runner with hashicorp/go-plugin, streams a completion from it and ends it.
package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"log"
	"os"
	"os/exec"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	_ "google.golang.org/genproto/googleapis/rpc/errdetails" // what Details() returns
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"example.com/mlxrunner/runnerpb"
)

func main() {
	// go-plugin hands on its stdin. The end of this one ends the runner, also when we are killed.
	stdin, hold, err := os.Pipe()
	check(err)
	os.Stdin = stdin
	token := rand.Text()
	check(os.Setenv("MLX_RUNNER_TOKEN", token))
	python := cmp.Or(os.Getenv("MLX_RUNNER_PYTHON"), "python3")
	runner := plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig:  plugin.HandshakeConfig{ProtocolVersion: 1, MagicCookieKey: "UNUSED"},
		Plugins:          plugin.PluginSet{},
		AllowedProtocols: []plugin.Protocol{plugin.ProtocolGRPC},
		Cmd:              exec.Command(python, "-m", "runner_server", "--listen", "127.0.0.1:0", "--exit-with-parent"),
		Logger:           hclog.NewNullLogger(),
		Stderr:           os.Stderr, // the runner's log
	})
	defer func() { hold.Close(); runner.Kill() }() // returns when the process is gone
	connection, err := runner.Client()
	check(err)
	client := runnerpb.NewRunnerServiceClient(connection.(*plugin.GRPCClient).Conn)
	ctx := metadata.AppendToOutgoingContext(context.Background(), "authorization", "Bearer "+token)
	_, err = client.Load(ctx, &runnerpb.LoadRequest{Model: os.Args[1]})
	check(err)
	prompt := &runnerpb.CompletionRequest_Prompt{Prompt: "def fibonacci(n):"}
	options := &runnerpb.CompletionOptions{Temperature: new(float32(0)), NumPredict: new(int32(64))}
	stream, err := client.Completion(ctx, &runnerpb.CompletionRequest{Input: prompt, Options: options})
	check(err)
	for chunk := new(runnerpb.CompletionResponse); !chunk.GetDone(); fmt.Print(chunk.GetContent()) {
		chunk, err = stream.Recv()
		check(err)
	}
}

func check(err error) {
	if err != nil {
		log.Fatal(err, status.Convert(err).Details()) // with the ErrorInfo that names the reason
	}
}
