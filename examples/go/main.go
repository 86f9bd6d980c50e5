// Spawn starts a runner with hashicorp/go-plugin, streams a completion and stops the runner.
package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"log"
	"os"
	"os/exec"
	"time"

	"example.com/mlxrunner/runnerpb"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	_ "google.golang.org/genproto/googleapis/rpc/errdetails" // the types returned by Details()
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

func main() {
	// go-plugin passes its stdin on. The runner exits when this pipe closes, even if we are killed.
	stdin, hold, err := os.Pipe()
	check(err)
	os.Stdin = stdin
	token := rand.Text()
	check(os.Setenv("MLX_RUNNER_TOKEN", token))
	runner := plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig:  plugin.HandshakeConfig{ProtocolVersion: 1, MagicCookieKey: "UNUSED"},
		Plugins:          plugin.PluginSet{},
		AllowedProtocols: []plugin.Protocol{plugin.ProtocolGRPC},
		Cmd:              exec.Command("python3", "-m", "runner_server", "--listen", "127.0.0.1:0", "--exit-with-parent"),
		Logger:           hclog.NewNullLogger(),
		Stderr:           os.Stderr, // the runner's log
	})
	defer func() { hold.Close(); runner.Kill() }() // returns once the process has exited
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	client := runnerpb.NewRunnerServiceClient(must(runner.Client()).(*plugin.GRPCClient).Conn)
	must(client.Load(ctx, &runnerpb.LoadRequest{Model: os.Args[1]}))
	prompt := &runnerpb.CompletionRequest_Prompt{Prompt: "def fibonacci(n):"}
	options := &runnerpb.CompletionOptions{Temperature: new(float32(0)), NumPredict: new(int32(64))}
	stream := must(client.Completion(ctx, &runnerpb.CompletionRequest{Input: prompt, Options: options}))
	for done := false; !done; {
		chunk := must(stream.Recv()) // io.EOF before `done` is a failure
		fmt.Print(chunk.GetContent())
		done = chunk.GetDone()
	}
}

func must[T any](value T, err error) T { check(err); return value }

// check exits on an error, which closes the pipe and so stops the runner.
func check(err error) {
	if err != nil {
		log.Fatal(err, status.Convert(err).Details()) // includes the ErrorInfo with the reason
	}
}
