/* Runs a graph model on input x [2, 64], whose numbers go from -1 to 1, and prints output y
 * exactly. graph_main MODEL
 */
#include <qigen_loader.h>
#include <stdio.h>

static int failed(const qigen_api* api, qigen_status status) {
  fprintf(stderr, "%s\n", api->last_error());
  return (int)status;
}

int main(int count, char** values) {
  qigen_api api;
  char problem[768];
  qigen_model* model = NULL;
  static float x[2 * 64], y[2 * 32];
  qigen_tensor input = {"x", QIGEN_FLOAT32, 2, {2, 64}, x, sizeof x};
  qigen_tensor output = {"y", 0, 0, {0}, y, sizeof y};
  qigen_status status;
  if (count != 2) return 2;
  for (int i = 0; i < 2 * 64; ++i) x[i] = (float)(i - 64) / 64.0f;
  status = qigen_api_open(&api, values[1], problem, sizeof problem);
  if (status != QIGEN_OK) {
    fprintf(stderr, "%s\n", problem);
    return (int)status;
  }
  status = api.model_load(values[1], NULL, &model);
  if (status != QIGEN_OK) return failed(&api, status);
  status = api.model_run(model, &input, 1, &output, 1);
  if (status != QIGEN_OK) return failed(&api, status);
  for (int i = 0; i < 2 * 32; ++i) printf("%a\n", (double)y[i]);
  api.model_free(model);
  qigen_api_close(&api);
  return 0;
}
