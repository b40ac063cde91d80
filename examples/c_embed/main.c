/* Streams text from a qigen artifact: greedy continuation of a prompt given as token ids.
 *   c_embed smollm2.qgn 33 28 216 34 28 216 35 28 -n 32
 */
#include <qigen_loader.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

static double seconds(void) {
  struct timespec now;
  timespec_get(&now, TIME_UTC);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int parse_number(const char* text, int32_t* number) {
  char* end = NULL;
  *number = (int32_t)strtol(text, &end, 10);
  return end != text && *end == '\0';
}

/* Evaluates the prompt, then one token after the other until `count` are written or the text ends.
 */
static qigen_status generate(const qigen_api* api, const qigen_model* model, qigen_session* session,
                             const int32_t* prompt, int32_t n_prompt, int32_t count) {
  const qigen_sampler greedy = {.struct_size = sizeof greedy};
  struct rusage usage;
  int32_t token = 0, generated = 0;
  double start = 0;
  qigen_status status =
      api->session_next(session, prompt, n_prompt, &greedy, NULL, 0, NULL, &token);
  start = seconds();
  while (status == QIGEN_OK && generated < count) {
    const char* text = NULL;
    size_t length = 0;
    if (api->model_is_eos(model, token)) break;
    status = api->token_text(model, token, &text, &length);
    if (status != QIGEN_OK) break;
    fwrite(text, 1, length, stdout);
    fflush(stdout);
    if (++generated < count) {
      status = api->session_next(session, &token, 1, &greedy, NULL, 0, NULL, &token);
    }
  }
  if (status != QIGEN_OK) return status;

  printf("\n");
  getrusage(RUSAGE_SELF, &usage);
  fprintf(stderr, "%d tokens, %.1f tokens/s, peak %ld KiB of memory\n", (int)generated,
          generated / (seconds() - start), usage.ru_maxrss);
  return QIGEN_OK;
}

int main(int count, char** values) {
  qigen_api api;
  qigen_model* model = NULL;
  qigen_session* session = NULL;
  qigen_status status;
  char problem[768];
  int32_t n = 32, n_prompt = 0;
  int32_t* prompt = malloc(sizeof(int32_t) * (size_t)(count + 1));
  int good = prompt != NULL;
  for (int i = 2; good && i < count; ++i) {
    if (strcmp(values[i], "-n") == 0) {
      good = ++i < count && parse_number(values[i], &n);
    } else {
      good = parse_number(values[i], &prompt[n_prompt++]);
    }
  }
  if (!good || n_prompt == 0) {
    fprintf(stderr, "usage: c_embed ARTIFACT TOKEN... [-n COUNT]\n");
    free(prompt);
    return QIGEN_USAGE;
  }

  status = qigen_api_open(&api, values[1], problem, sizeof problem);
  if (status != QIGEN_OK) {
    fprintf(stderr, "error: %s\n", problem);
    free(prompt);
    return status;
  }
  status = api.model_load(values[1], NULL, &model);
  if (status == QIGEN_OK) status = api.session_create(model, 0, &session);
  if (status == QIGEN_OK) status = generate(&api, model, session, prompt, n_prompt, n);
  if (status != QIGEN_OK) fprintf(stderr, "error: %s\n", api.last_error());

  if (session) api.session_free(session);
  if (model) api.model_free(model);
  qigen_api_close(&api);
  free(prompt);
  return status;
}
