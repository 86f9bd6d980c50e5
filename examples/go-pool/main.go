// Host starts a pool with hashicorp/go-plugin, completes with each MODEL, lists the models and stops.
package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"log"
	"os"
	"os/exec"
	"time"

	pb "example.com/mlxrunner/runnerpb"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	_ "google.golang.org/genproto/googleapis/rpc/errdetails" // the types returned by Details()
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

func main() {
	// go-plugin passes its stdin on. The pool and its runners exit when this pipe closes.
	stdin, hold, _ := os.Pipe()
	os.Stdin = stdin
	token := rand.Text()
	os.Setenv("MLX_RUNNER_TOKEN", token)
	host := plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig:  plugin.HandshakeConfig{ProtocolVersion: 1, MagicCookieKey: "UNUSED"},
		Plugins:          plugin.PluginSet{},
		AllowedProtocols: []plugin.Protocol{plugin.ProtocolGRPC},
		Cmd:              exec.Command("mlx-runner", "pool", "--budget", "4GiB", "--exit-with-parent"),
		Logger:           hclog.NewNullLogger(),
		Stderr:           os.Stderr, // the log of the pool and its runners
	})
	defer func() { hold.Close(); host.Kill() }() // returns once the process has exited
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	conn := must(host.Client()).(*plugin.GRPCClient).Conn
	prompt := &pb.CompletionRequest_Prompt{Prompt: "def fibonacci(n):"}
	options := &pb.CompletionOptions{Temperature: new(float32(0)), NumPredict: new(int32(64))}
	for _, model := range os.Args[1:] { // loaded by the first request, evicted if memory is short
		request := &pb.CompletionRequest{Model: model, Input: prompt, Options: options}
		stream := must(pb.NewRunnerServiceClient(conn).Completion(ctx, request))
		for chunk := (*pb.CompletionResponse)(nil); !chunk.GetDone(); {
			chunk = must(stream.Recv()) // io.EOF before `done` is a failure
			fmt.Print(chunk.GetContent())
		}
	}
	for _, model := range must(pb.NewPoolServiceClient(conn).ListModels(ctx, &pb.ListModelsRequest{})).Models {
		log.Printf("%s: %s, %d MiB", model.Name, model.State, model.HeldBytes>>20)
	}
}
func must[T any](value T, err error) T { check(err); return value }
func check(err error) { // an error closes the pipe and so stops the pool
	if err != nil {
		log.Fatal(err, status.Convert(err).Details()) // includes the ErrorInfo with the reason
	}
}
