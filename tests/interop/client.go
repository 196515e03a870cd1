// gRPC's interoperability cases with google.golang.org/grpc; client PORT prints each case that passed.
// Messages are written and read field by field, so that no generated code is needed.
package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
)

const (
	special  = "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n"
	initial  = "x-grpc-test-echo-initial"
	trailing = "x-grpc-test-echo-trailing-bin"
)

var (
	responses = []int{31415, 9, 2653, 58979}
	requests  = []int{27182, 8, 1828, 45904}
)

// raw passes messages through as bytes.
type raw struct{}

func (raw) Marshal(v interface{}) ([]byte, error) { return *v.(*[]byte), nil }
func (raw) Unmarshal(data []byte, v interface{}) error {
	*v.(*[]byte) = append([]byte(nil), data...)
	return nil
}
func (raw) Name() string { return "proto" }

func number(field int, value int) []byte {
	return protowire.AppendVarint(protowire.AppendTag(nil, protowire.Number(field), protowire.VarintType), uint64(value))
}

func nested(field int, value []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, protowire.Number(field), protowire.BytesType), value)
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func payload(field int, size int) []byte { return nested(field, nested(2, make([]byte, size))) }

func echoStatus(text string) []byte { return nested(7, join(number(1, 2), nested(2, []byte(text)))) }

func ask(response, request, intervalUs int) []byte {
	return join(nested(2, join(number(1, response), number(2, intervalUs))), payload(3, request))
}

// bodySize is the size of payload.body in a response whose payload is field 1.
func bodySize(message []byte) int {
	_, _, n := protowire.ConsumeTag(message)
	if n < 0 {
		return 0
	}
	inner, _ := protowire.ConsumeBytes(message[n:])
	for len(inner) > 0 {
		field, kind, n := protowire.ConsumeTag(inner)
		inner = inner[n:]
		if field == 2 {
			body, _ := protowire.ConsumeBytes(inner)
			return len(body)
		}
		inner = inner[protowire.ConsumeFieldValue(field, kind, inner):]
	}
	return 0
}

func must(ok bool, format string, args ...interface{}) {
	if !ok {
		log.Fatalf(format, args...)
	}
}

type caller struct{ conn *grpc.ClientConn }

func (c caller) invoke(ctx context.Context, method string, in []byte, options ...grpc.CallOption) ([]byte, error) {
	var out []byte
	err := c.conn.Invoke(ctx, method, &in, &out, options...)
	return out, err
}

func (c caller) stream(ctx context.Context, method string) grpc.ClientStream {
	desc := &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}
	stream, err := c.conn.NewStream(ctx, desc, method)
	must(err == nil, "NewStream: %v", err)
	return stream
}

func send(stream grpc.ClientStream, message []byte) {
	err := stream.SendMsg(&message)
	must(err == nil || err == io.EOF, "SendMsg: %v", err)
}

func receive(stream grpc.ClientStream) ([]byte, error) {
	var out []byte
	err := stream.RecvMsg(&out)
	return out, err
}

func main() {
	conn, err := grpc.Dial("127.0.0.1:"+os.Args[1], grpc.WithInsecure(),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(raw{})))
	must(err == nil, "Dial: %v", err)
	defer conn.Close()
	c := caller{conn}
	const service = "/grpc.testing.TestService/"
	background := context.Background()
	passed := func(name string) { fmt.Println(name) }

	_, err = c.invoke(background, service+"EmptyCall", nil)
	must(err == nil, "empty_unary: %v", err)
	passed("empty_unary")

	large := join(number(2, 314159), payload(3, 271828))
	out, err := c.invoke(background, service+"UnaryCall", large)
	must(err == nil && bodySize(out) == 314159, "large_unary: %v", err)
	passed("large_unary")
	out, err = c.invoke(background, service+"UnaryCall", large, grpc.UseCompressor(gzip.Name))
	must(err == nil && bodySize(out) == 314159, "compressed_unary: %v", err)
	passed("compressed_unary")

	stream := c.stream(background, service+"StreamingInputCall")
	for _, size := range requests {
		send(stream, payload(1, size))
	}
	stream.CloseSend()
	out, err = receive(stream)
	must(err == nil && bytes.Equal(out, number(1, 74922)), "client_streaming: %v %v", out, err)
	passed("client_streaming")

	stream = c.stream(background, service+"StreamingOutputCall")
	var all []byte
	for _, size := range responses {
		all = join(all, nested(2, number(1, size)))
	}
	send(stream, all)
	stream.CloseSend()
	for _, size := range responses {
		out, err = receive(stream)
		must(err == nil && bodySize(out) == size, "server_streaming: %v", err)
	}
	_, err = receive(stream)
	must(err == io.EOF, "server_streaming: %v", err)
	passed("server_streaming")

	stream = c.stream(background, service+"FullDuplexCall")
	for i, size := range responses {
		send(stream, ask(size, requests[i], 0))
		out, err = receive(stream)
		must(err == nil && bodySize(out) == size, "ping_pong: %v", err)
	}
	stream.CloseSend()
	_, err = receive(stream)
	must(err == io.EOF, "ping_pong: %v", err)
	passed("ping_pong")

	stream = c.stream(background, service+"FullDuplexCall")
	stream.CloseSend()
	_, err = receive(stream)
	must(err == io.EOF, "empty_stream: %v", err)
	passed("empty_stream")

	ctx, cancel := context.WithCancel(background)
	stream = c.stream(ctx, service+"StreamingInputCall")
	cancel()
	_, err = receive(stream)
	must(status.Code(err) == codes.Canceled, "cancel_after_begin: %v", err)
	passed("cancel_after_begin")

	ctx, cancel = context.WithCancel(background)
	stream = c.stream(ctx, service+"FullDuplexCall")
	send(stream, ask(responses[0], requests[0], 0))
	_, err = receive(stream)
	must(err == nil, "cancel_after_first_response: %v", err)
	cancel()
	_, err = receive(stream)
	must(status.Code(err) == codes.Canceled, "cancel_after_first_response: %v", err)
	passed("cancel_after_first_response")

	ctx, cancel = context.WithTimeout(background, 50*time.Millisecond)
	stream = c.stream(ctx, service+"FullDuplexCall")
	send(stream, ask(responses[0], requests[0], 20000000))
	_, err = receive(stream)
	must(status.Code(err) == codes.DeadlineExceeded, "timeout_on_sleeping_server: %v", err)
	cancel()
	passed("timeout_on_sleeping_server")

	for _, text := range []string{"test status message", special} {
		_, err = c.invoke(background, service+"UnaryCall", echoStatus(text))
		got := status.Convert(err)
		must(got.Code() == codes.Unknown && got.Message() == text, "status_code_and_message: %v", err)
		stream = c.stream(background, service+"FullDuplexCall")
		send(stream, echoStatus(text))
		stream.CloseSend()
		_, err = receive(stream)
		got = status.Convert(err)
		must(got.Code() == codes.Unknown && got.Message() == text, "status_code_and_message: %v", err)
	}
	passed("status_code_and_message")

	ctx = metadata.AppendToOutgoingContext(background, initial, "test_initial_metadata_value", trailing, "\xab\xab\xab")
	var header, trailer metadata.MD
	_, err = c.invoke(ctx, service+"UnaryCall", number(2, 10), grpc.Header(&header), grpc.Trailer(&trailer))
	check := func() {
		must(err == nil && len(header[initial]) == 1 && header[initial][0] == "test_initial_metadata_value" &&
			len(trailer[trailing]) == 1 && trailer[trailing][0] == "\xab\xab\xab",
			"custom_metadata: %v %v %v", err, header, trailer)
	}
	check()
	stream = c.stream(ctx, service+"FullDuplexCall")
	send(stream, ask(10, 10, 0))
	stream.CloseSend()
	_, err = receive(stream)
	must(err == nil, "custom_metadata: %v", err)
	receive(stream)
	header, err = stream.Header()
	trailer = stream.Trailer()
	check()
	passed("custom_metadata")

	for _, name := range []string{"TestService", "UnimplementedService"} {
		_, err = c.invoke(background, "/grpc.testing."+name+"/UnimplementedCall", nil)
		must(status.Code(err) == codes.Unimplemented, "unimplemented: %v", err)
	}
	passed("unimplemented_method_and_service")
}
